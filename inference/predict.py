"""Predict the most likely classes of images, and explain the predictions."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inputs.data import eval_loader
from inputs.folders import walk_files
from inputs.images import file_dataset, is_image_name
from inputs.loader import EvalLoader
from models import LoadedModel
from models.pretrained import PREPROCESSING
from runtime.processes import Distributed
from training.precision import as_input, choose_precision
from utils import UserError, atomic_write, say

from .explanations import class_evidence, displayable, draw_overlay, overlay_paths
from .output_files import check_output, save_figure, write_csv, write_json, write_parquet


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


def report_unreadable(loader: EvalLoader) -> None:
    """Raise UserError if the loader could not read some of the images; it has printed them."""
    if loader.skipped:
        raise UserError(f"{len(loader.skipped)} of {len(loader.dataset)} images could not be read (listed above)")


@torch.no_grad()
def run_prediction(args: argparse.Namespace, dist: Distributed, loaded: LoadedModel) -> None:
    """Print each image's most likely classes; on request, write predictions, embeddings and explanations to files.

    Raises:
        UserError: at the end, if some of the images could not be read.
    """
    files = image_files(args.image)
    overlays = [] if args.explain is None else overlay_paths(files, Path(args.explain), "--explain", "explained")
    check_output(args.output, (".json", ".csv", ".parquet"))
    check_output(args.embeddings, (".npy",), "--embeddings")
    model, precision = loaded.model.to(dist.device), choose_precision(args, dist.device)
    classifier_inputs: list[Tensor] = []
    if args.embeddings is not None:
        model.get_classifier().register_forward_pre_hook(lambda _layer, inputs: classifier_inputs.append(inputs[0]))

    def predict(images: Tensor) -> Tensor:
        with precision.autocast():
            return model(as_input(images, precision)).float()

    records, embeddings = [], []
    photographs = file_dataset(files, [0] * len(files), ["unknown"], upright=True)
    loader = eval_loader(args, dist, photographs, {name: getattr(loaded, name) for name in PREPROCESSING})
    for batch in loader:
        classifier_inputs.clear()
        best = predict(batch.images).softmax(1).topk(min(args.topk, loaded.num_classes))
        embeddings += [inputs.float().cpu() for inputs in classifier_inputs[:1]]  # the second are --tta's mirrored ones
        for index, image, probabilities, classes in zip(batch.indices.tolist(), batch.images, *best, strict=True):
            record = describe_prediction(files[index], probabilities, classes, loaded)
            records.append(record)
            if not args.quiet:
                say(one_line_of(record))
            if overlays:
                heat = class_evidence(predict, image, int(classes[0]), args.batch_size)
                title = one_line_of(record | {"image": files[index].name})
                save_figure(overlays[index], draw_overlay(displayable(image, loaded), heat, title))
    write_predictions(args, loaded, records, embeddings)
    report_unreadable(loader)


def describe_prediction(file: Path, probabilities: Tensor, classes: Tensor, loaded: LoadedModel) -> dict[str, Any]:
    """Return an image's most likely classes, and its true class if its folder has the name of a class."""
    pairs = zip(probabilities.tolist(), classes.tolist(), strict=True)
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
