"""The likeliest classes of images."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from inputs.images import ImageFiles, read_image
from inputs.loader import EvalLoader, KeyedImages
from inputs.transforms import eval_transform
from models.base import ImageModel
from runtime.processes import Distributed
from training.precision import Precision, as_input, choose_precision
from utils import UserError, printable, say

from .explanations import class_activation, class_evidence, displayable, draw_overlay, overlay_paths
from .figures import save_figure
from .from_checkpoint import ModelInfo
from .results import check_output, write_results

TOP = 5


class Photographs(ImageFiles):
    """Image files without labels, turned as their EXIF orientation says."""

    def __init__(self, paths: Sequence[Path]):
        super().__init__([str(path) for path in paths], [0] * len(paths), ("",))

    def load(self, index: int):
        return read_image(self.path(index), upright=True), 0


def image_files(paths: Sequence[Path]) -> list[Path]:
    """The files, and those in the folders and their subfolders that have an image's extension, sorted.

    Raises UserError for a path that is not there and a folder without images.
    """
    files = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())
            if not found:
                raise UserError(f"--image {path}: no images ({' '.join(IMG_EXTENSIONS)}) in this folder")
        elif not path.exists():
            raise UserError(f"--image {path}: no such file")
        files += found
    return files


@torch.no_grad()
def run_prediction(args: argparse.Namespace, dist: Distributed, model: nn.Module, info: ModelInfo) -> None:
    """Print each image's likeliest classes; on request save them as JSON, and the overlays."""
    files = image_files(args.image)
    overlays = []
    if args.explain is not None:
        overlays = overlay_paths(files, Path(args.explain or info.path.parent / "explained"))
    if args.output is not None:
        check_output(args.output)
    transform = eval_transform(args.input_size, crop_pct=args.eval_crop_pct, interpolation=info.interpolation)
    samples = KeyedImages(Photographs(files), transform, mean=info.mean, std=info.std)
    loader = EvalLoader(samples, args.batch_size, dist, args.num_workers, args.pin_mem)
    precision = choose_precision(args, dist.device)

    def predict(images: Tensor) -> Tensor:
        with precision.autocast():
            return model(as_input(images, precision)).float()

    records = []
    for batch in loader:
        best = predict(batch.images).softmax(1).topk(min(TOP, info.num_classes))
        for image, index, probabilities, classes in zip(batch.images, batch.indices, *best, strict=True):
            record = describe_prediction(files[index], probabilities.tolist(), classes.tolist(), info)
            records.append(record)
            say_prediction(record)
            if overlays:
                maps = explain(model, image, int(classes[0]), predict, precision, args.batch_size)
                save_figure(overlays[index], draw_overlay(displayable(image, info), maps, summary(record)))
                say(printable(f"    overlay: {overlays[index]}"))
    if args.output is not None:
        content = {"model_path": str(info.path), "arch": info.arch, "ema": info.ema, "predictions": records}
        write_results(args.output, content)


def describe_prediction(
    file: Path, probabilities: Sequence[float], classes: Sequence[int], info: ModelInfo
) -> dict[str, Any]:
    """An image's likeliest classes, and the true one if it lies in a class's folder."""
    record: dict[str, Any] = {"image": str(file)}
    record["classes"] = [
        {"index": i, "class": info.class_name(i), "probability": p} for p, i in zip(probabilities, classes, strict=True)
    ]
    folder = file.absolute().parent.name
    if folder in info.labels:
        true = info.labels.index(folder)
        record["true"] = {"index": true, "class": info.class_name(true)}
    return record


def say_prediction(record: Mapping[str, Any]) -> None:
    say(printable(record["image"]))
    for entry in record["classes"]:
        say(printable(f"    {100 * entry['probability']:6.2f} %  {entry['class']}"))
    if "true" in record:
        say(printable(f"        true  {record['true']['class']}"))


def summary(record: Mapping[str, Any]) -> str:
    """The likeliest class, and the true one where it is known."""
    best = record["classes"][0]
    told = f"predicted {best['class']} ({100 * best['probability']:.1f} %)"
    return told + (f", true {record['true']['class']}" if "true" in record else "")


def explain(
    model: nn.Module,
    image: Tensor,
    target: int,
    predict: Callable[[Tensor], Tensor],
    precision: Precision,
    batch_size: int,
) -> dict[str, Tensor]:
    """Maps (rows, columns) of what spoke for a class in an image (3, H, W), by name.

    A class activation is of ours alone, and only where it tells places apart.
    """
    maps = {}
    if isinstance(model, ImageModel):
        with precision.autocast():
            activation = class_activation(model, as_input(image[None], precision), target)
        if activation.numel() > 1:
            maps[f"class activation, {'x'.join(map(str, activation.shape))}"] = activation
    return maps | {"drop when hidden": class_evidence(predict, image, target, batch_size)}
