"""Predict the most likely classes of images, and explain the predictions."""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from inputs.folders import walk_files
from inputs.images import BadImage, is_image_name, read_image
from models import LoadedModel
from runtime.processes import Distributed
from training.precision import as_input, choose_precision
from utils import UserError, atomic_write, say, tell

from .explanations import class_evidence, displayable, draw_overlay, overlay_paths
from .output_files import check_output, save_figure, write_csv, write_json, write_parquet

FORMATS = (".json", ".csv", ".parquet")


class Photographs(Dataset):
    """Image files, rotated by their EXIF orientation and transformed; (index, error) for an unreadable file."""

    def __init__(self, paths: Sequence[Path], transform: Callable[..., Tensor], **decoding: Any):
        """`decoding` is passed to `read_image`."""
        self._paths, self._transform, self._decoding = paths, transform, decoding

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[int, Tensor | BadImage]:
        try:
            return index, self._transform(read_image(self._paths[index], upright=True, **self._decoding))
        except BadImage as error:
            return index, error


def image_files(paths: Sequence[Path]) -> list[Path]:
    """Return the given files and all image files below the given folders, sorted, without hidden files.

    Raises:
        UserError: if a path does not exist, or a folder contains no images.
    """
    files = []
    for path in paths:
        if not path.exists():
            raise UserError(f"--image {path}: no such file")
        found = [path]
        if path.is_dir():
            found = sorted(Path(file) for file in walk_files(path) if is_image_name(file))
            if not found:
                raise UserError(f"--image {path}: no images in this folder")
        files += found
    return files


def report_unreadable(bad: Sequence[BadImage], total: int) -> None:
    """List the images that could not be read, and raise UserError if there are any."""
    for error in bad:
        tell(str(error))
    if bad:
        raise UserError(f"{len(bad)} of {total} images could not be read (listed above)")


@torch.no_grad()
def run_prediction(args: argparse.Namespace, dist: Distributed, loaded: LoadedModel) -> None:
    """Print each image's most likely classes; on request, write predictions, embeddings and explanations to files.

    Raises:
        UserError: at the end, if some of the images could not be read.
    """
    files = image_files(args.image)
    overlays = []
    if args.explain is not None:
        overlays = overlay_paths(files, Path(args.explain))
    if args.output is not None:
        check_output(args.output, FORMATS)
    if args.embeddings is not None:
        check_output(args.embeddings, (".npy",), "--embeddings")
    model, precision = loaded.model.to(dist.device), choose_precision(args, dist.device)
    classifier_inputs: list[Tensor] = []
    if args.embeddings is not None:
        model.get_classifier().register_forward_pre_hook(lambda _layer, inputs: classifier_inputs.append(inputs[0]))

    def predict(images: Tensor) -> Tensor:
        with precision.autocast():
            return model(as_input(images, precision)).float()

    records, embeddings, bad = [], [], []
    photographs = Photographs(files, loaded.transform, channels=len(loaded.mean), pixel_range=args.pixel_range)
    loader = DataLoader(photographs, args.batch_size, num_workers=args.num_workers, collate_fn=list)
    for batch in loader:
        bad += [error for _, error in batch if isinstance(error, BadImage)]
        images = {index: image.to(dist.device) for index, image in batch if isinstance(image, Tensor)}
        if not images:
            continue
        classifier_inputs.clear()
        best = predict(torch.stack(list(images.values()))).softmax(1).topk(min(args.topk, loaded.num_classes))
        embeddings += [inputs.float().cpu() for inputs in classifier_inputs[:1]]  # the second are --tta's mirrored ones
        for (index, image), probabilities, classes in zip(images.items(), *best, strict=True):
            record = describe_prediction(files[index], probabilities.tolist(), classes.tolist(), loaded)
            records.append(record)
            if not args.quiet:
                say(one_line_of(record))
            if overlays:
                heat = class_evidence(predict, image, int(classes[0]), args.batch_size)
                title = one_line_of(record | {"image": files[index].name})
                save_figure(overlays[index], draw_overlay(displayable(image, loaded), heat, title))
    write_predictions(args, loaded, records, embeddings)
    report_unreadable(bad, len(files))


def describe_prediction(
    file: Path, probabilities: Sequence[float], classes: Sequence[int], loaded: LoadedModel
) -> dict[str, Any]:
    """Return an image's most likely classes, and its true class if its folder has the name of a class."""
    pairs = zip(probabilities, classes, strict=True)
    likely = [{"index": i, "class": loaded.label(i), "probability": p} for p, i in pairs]
    record: dict[str, Any] = {"image": str(file), "classes": likely}
    folder = file.absolute().parent.name
    if folder in loaded.class_names:
        true = loaded.class_names.index(folder)
        record["true"] = {"index": true, "class": loaded.label(true)}
    return record


def one_line_of(record: Mapping[str, Any]) -> str:
    """Format a prediction: ``photo.jpg: cat 97.1 %, dog 2.0 % (true: cat)``."""
    classes = ", ".join(f"{entry['class']} {100 * entry['probability']:.1f} %" for entry in record["classes"])
    return f"{record['image']}: {classes}" + (f" (true: {record['true']['class']})" if "true" in record else "")


def write_predictions(
    args: argparse.Namespace, loaded: LoadedModel, records: Sequence[dict[str, Any]], embeddings: Iterable[Tensor]
) -> None:
    """Write the files of --output and --embeddings."""
    if args.output is not None and args.output.suffix == ".json":
        content = {"model_path": str(loaded.path), "arch": loaded.arch, "ema": loaded.ema, "predictions": records}
        write_json(args.output, content)
    elif args.output is not None:
        write = write_csv if args.output.suffix == ".csv" else write_parquet
        names, numbers = ("class", "probability"), range(1, min(args.topk, loaded.num_classes) + 1)
        header = ["image", *(f"{name}_{i}" for i in numbers for name in names), "true"]
        rows = []
        for record in records:
            values = [entry[name] for entry in record["classes"] for name in names]
            rows.append([record["image"], *values, record.get("true", {}).get("class", "")])
        write(args.output, header, rows)
    if args.embeddings is not None and records:
        table = torch.cat(list(embeddings)).numpy()
        atomic_write(args.embeddings, lambda file: np.save(file, table))
        files = "".join(f"{record['image']}\n" for record in records)
        atomic_write(args.embeddings.with_suffix(".txt"), files)
