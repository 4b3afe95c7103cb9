#!/usr/bin/env python
"""Evaluate a checkpoint on a data set, or classify images with it; measure and explain what it predicts.

    infer.py --model-path CKPT --data-path /path/to/imagenet     loss, acc@1, acc@5, images/s; results as JSON
    infer.py --model-path CKPT --image a.jpg folder/ --explain   the likeliest classes and what spoke for them

What the model is comes from the checkpoint: ours says so, the authors' is recognised by its weights.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.data import ImageNetInfo
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode

import checkpointing
import models
from cli import (
    COUNT,
    FRACTION,
    POSITIVE,
    HelpFormatter,
    KeyValues,
    Parser,
    class_list,
    dashed,
    image_size,
    switch,
)
from datasets import (
    Batch,
    Data,
    EvalLoader,
    ImageFiles,
    KeyedDataset,
    LoaderSettings,
    build_eval,
    build_transform,
    read_image,
)
from engine import as_input, choose_precision, create_model, evaluate, load
from models.base import ImageModel
from models.checkpoints import to_ours, unwrap
from utils import Distributed, UserError, atomic_write, init_distributed, make_directory, one_line, run_cli

TOP = 5
SPECTRAL_WEIGHT = re.compile(r"(?:stages\.([0-3])\.)?blocks\.\d+\.mixer\.(complex_weight|low_pass)")
STEMS = ("patch_embed.proj.weight", "stem.conv.0.weight")
WAVELET_FILTER = re.compile(r"(^|\.)[xi]fm\.")
NAMED_CLASSES = 60  # up to so many classes a confusion matrix has their names at its sides
COUNTED_CLASSES = 20  # and up to so many the counts in its cells
SHOWN_CONFUSIONS = 15
CELLS = 14  # rows and columns of the map that explains a prediction
HIDDEN = 4  # of those, in each direction, that are hidden at a time


# ---------------------------------------------------------------------------------- a model from a checkpoint


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint says about its model and about the images it is for."""

    path: Path
    arch: str
    model_kwargs: dict[str, Any]
    num_classes: int
    class_names: tuple[str, ...] | None
    input_size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    ema: bool
    args: dict[str, Any]  # of the run that trained it

    def class_name(self, index: int) -> str:
        """A class as it is told to a reader; ImageNet's WordNet ids come with their first description."""
        name = str(index) if self.class_names is None else self.class_names[index]
        if self.class_names is None and self.num_classes == imagenet().num_classes():
            name = imagenet().index_to_label_name(index)
        if not re.fullmatch(r"n\d{8}", name):
            return name
        return f"{name} {imagenet().label_name_to_description(name).split(',')[0]}".strip()


@cache
def imagenet() -> ImageNetInfo:
    return ImageNetInfo()


def build_from_checkpoint(
    path: str | Path,
    arch: str | None = None,
    *,
    ema: bool | None = None,
    input_size: tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, ModelInfo]:
    """The model that a checkpoint holds, in evaluation mode on the CPU, and what there is to know about it.

    Args:
        path: a checkpoint of ours, of the authors' or of timm.
        arch: the model's name, needed only where the checkpoint neither says nor shows it.
        ema: the averaged weights, the trained ones, or (None) the averaged ones if there are any.
        input_size: (height, width) to build it for, by default its own; weights are resized.
        model_kwargs: constructor arguments beside those of the checkpoint.

    Raises:
        UserError: the file is unusable, contradicts `arch`, or is of no known model.
    """
    path = Path(path)
    state = checkpointing.load(path)
    weights = checkpointing.weights(state, ema, path)
    shapes = _our_shapes(weights, path)
    name, kwargs = _identify(state, shapes, arch, path)
    kwargs |= dict(model_kwargs or {})
    cfg = get_pretrained_cfg(name) or PretrainedCfg()
    native = _pair(state, path) or _native_size(shapes) or tuple(cfg.input_size[1:])
    num_classes = state.get("num_classes") or _count_classes(shapes, cfg, path)
    try:
        model = create_model(name, num_classes, input_size or native, kwargs)
    except UserError as error:  # of the checkpoint's arch or arguments as likely as of the command line's
        raise UserError(f"{path}: {error}") from error
    load(model, weights, str(path), new_head=False)
    class_names = state.get("class_names")
    if class_names is not None and len(class_names) != num_classes:
        raise UserError(f"{path}: it names {len(class_names)} classes and has {num_classes}")
    info = ModelInfo(
        path,
        name,
        kwargs,
        num_classes,
        None if class_names is None else tuple(map(str, class_names)),
        input_size or native,
        _channels(state, "mean", cfg.mean, path),
        _channels(state, "std", cfg.std, path),
        _crop(state, cfg.crop_pct, path),
        _interpolation(state, cfg.interpolation, path),
        ema is not False and any(state.get(key) for key in checkpointing.EMA_KEYS),
        state.get("args") or {},
    )
    return model.eval(), info


def _our_shapes(weights: Mapping[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of weights under our names, but for the constant wavelet filters that some files hold."""
    try:
        ours = to_ours(unwrap(weights))
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: its weights are of no model known here: {one_line(error)}") from error
    return {name: tuple(value.shape) for name, value in ours.items() if not WAVELET_FILTER.search(name)}


def _identify(
    state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], arch: str | None, path: Path
) -> tuple[str, dict[str, Any]]:
    """(name, constructor arguments): as the checkpoint says, else as its weights show, else `arch`."""
    if state.get("arch") is None:
        fitting, kwargs = _recognise(shapes)
    else:
        fitting, kwargs = (_full_name(state["arch"]),), dict(state.get("model_kwargs") or {})
    if arch is None:
        if len(fitting) != 1:
            hint = f" ({', '.join(fitting)} with --model-kwargs)" if fitting else ""
            raise UserError(f"{path}: it does not say which model it holds; name it with --arch{hint}")
        return fitting[0], kwargs
    name = _full_name(arch)
    if name not in fitting and (fitting or name in models.ARCHITECTURES):
        raise UserError(f"{path}: it holds {' or '.join(fitting) or 'other weights'}, not --arch {arch}")
    return name, kwargs


def _full_name(name: str) -> str:
    """``svt_s`` is short for ``svt_h_s``."""
    return re.sub(r"^svt_(?=[sbl]$)", "svt_h_", models.resolve_arch(name))


def _recognise(shapes: Mapping[str, tuple[int, ...]]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the registered models that bare weights can be of, and the arguments that they show.

    One name if all shapes are those of a variant, the family's names for widths and depths of its own, none
    for weights that are not of our models.
    """
    family, kwargs = _structure(shapes)
    names = tuple(name for name in models.ARCHITECTURES if family and re.fullmatch(family, name))
    size = {"img_size": pixels} if (pixels := _native_size(shapes)) else {}
    for name in names:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=shapes.get("head.weight", (0,))[0], **kwargs, **size)
        except (ValueError, RuntimeError):  # the variant cannot be built like that
            continue
        if {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes:
            return (name,), kwargs
    return names, kwargs


def _structure(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str | None, dict[str, Any]]:
    """A pattern of the family's names, None if it is none of ours, and the arguments that the shapes show."""
    spectral = [match.groups() for match in map(SPECTRAL_WEIGHT.fullmatch, shapes) if match]
    stem = next((shapes[name] for name in STEMS if len(shapes.get(name, ())) == 4), None)
    if stem is None or not any(".mixer." in name for name in shapes) or "cls_token" in shapes:
        return None, {}
    kwargs: dict[str, Any] = {} if stem[1] == 3 else {"in_chans": stem[1]}
    if "pos_embed" in shapes:
        return r"spectformer_(ti|xs|s|b)", kwargs | {"alpha": len(spectral)}
    kwargs["spectral_depths"] = tuple(sum(stage == str(i) for stage, _ in spectral) for i in range(4))
    if "aux_head.weight" in shapes:
        kwargs["token_label"] = True
    if all(leaf == "complex_weight" for _, leaf in spectral):
        return r"spectformer_h_[sbl]", kwargs
    blends = tuple(any(f"{part}_blend." in name for name in shapes) for part in ("channel", "token"))
    mixing = {(True, False): "channel", (True, True): "channel_token"}.get(blends, "token")
    return r"svt_h_[sbl]", kwargs | {"mixing": mixing}


def _native_size(shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int] | None:
    """The image size for which bare weights of ours were made; None if they do not depend on it.

    A spectral gate keeps half of its columns, so an odd width is not told from an even one: a square is
    assumed where that is possible.
    """
    grids = [(match[1], match[2], shapes[match[0]]) for match in map(SPECTRAL_WEIGHT.fullmatch, shapes) if match]
    positions, patches = shapes.get("pos_embed", ()), shapes.get(STEMS[0], ())
    if len(positions) == 3 and len(patches) == 4:
        rows = grids[0][2][0] if grids and grids[0][2] else math.isqrt(positions[1])
        return rows * patches[-1], positions[1] // max(rows, 1) * patches[-1]
    for stage, leaf, shape in grids:
        if stage is not None and len(shape) >= 2:
            rows, columns = shape[:2]
            if leaf == "complex_weight":
                columns = rows if rows // 2 + 1 == columns else 2 * (columns - 1)
            return rows * 4 * 2 ** int(stage), columns * 4 * 2 ** int(stage)
    return None


def _count_classes(shapes: Mapping[str, tuple[int, ...]], cfg: PretrainedCfg, path: Path) -> int:
    names = (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier or ("head",))
    if not shapes.get(f"{names[0]}.weight"):
        raise UserError(f"{path}: it has no classifier {names[0]}.weight, so it cannot predict")
    return shapes[f"{names[0]}.weight"][0]


def _pair(state: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    """The checkpoint's input size, stored as one number or as height and width."""
    size = state.get("input_size")
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise UserError(f"{path}: its 'input_size' is {size!r}, not height and width")
    return pair


def _channels(state: Mapping[str, Any], key: str, default: Sequence[float], path: Path) -> tuple[float, ...]:
    values = state.get(key) or default
    numbers = [value for value in values if isinstance(value, (int, float)) and math.isfinite(value)]
    if len(values) != 3 or len(numbers) != 3 or (key == "std" and min(numbers) <= 0):
        raise UserError(f"{path}: its {key!r} is {values!r}, not a{' positive' * (key == 'std')} number a channel")
    return tuple(values)


def _crop(state: Mapping[str, Any], default: float, path: Path) -> float:
    part = default if state.get("crop_pct") is None else state["crop_pct"]
    if not 0 < part <= 1:
        raise UserError(f"{path}: its 'crop_pct' is {part}, not a part of the image's side")
    return part


def _interpolation(state: Mapping[str, Any], default: str, path: Path) -> str:
    name = default if state.get("interpolation") is None else state["interpolation"]
    known = ["random", *(mode.value for mode in InterpolationMode)]
    if name not in known:
        raise UserError(f"{path}: its 'interpolation' is {name!r}, not one of {', '.join(known)}")
    return name


# ------------------------------------------------------------------------------------------------- evaluation


class Watched:
    """Keeps the true and the predicted class of what passes from a loader through a model.

    Stands between `engine.evaluate` and its loader; `watch` is the model's forward hook.
    """

    def __init__(self, loader: EvalLoader):
        self.rounds = loader.rounds
        self._loader = loader
        self._pairs: list[list[Tensor]] = []

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            self._pairs.append([batch.targets])
            yield batch

    def watch(self, _module: nn.Module, _images: tuple[Tensor, ...], logits: Tensor) -> None:
        self._pairs[-1].append(logits.argmax(1))

    def pairs(self, dist: Distributed) -> np.ndarray:
        """(2, images) of all processes: true and predicted classes."""
        own = [torch.stack(pair).cpu().numpy() for pair in self._pairs]
        return np.concatenate([part for parts in dist.gather_objects(own) for part in parts], axis=1)


def run_evaluation(args: argparse.Namespace, dist: Distributed, model: nn.Module, info: ModelInfo) -> None:
    """Evaluate on all processes; the main one prints, and writes the results and the report."""
    data = build_eval(args, dist, mean=info.mean, std=info.std, interpolation=info.interpolation)
    check_classes(args, data, info)
    output = args.output or info.path.with_name(f"{info.path.stem}_{args.data_set.lower().replace('/', '-')}.json")
    check_replaceable(output)
    if args.report is not None and dist.is_main:
        make_directory(args.report)
    watched = Watched(data.val)
    model.register_forward_hook(watched.watch)
    began = time.perf_counter()
    results = evaluate(model, watched, dist, choose_precision(args, dist.device))
    seconds = time.perf_counter() - began
    pairs = watched.pairs(dist)
    if not dist.is_main:
        return
    results["mean_per_class"] = 100 * float(np.nanmean(class_accuracies(pairs, info.num_classes)))
    results |= {"images_per_second": results["images"] / seconds, "seconds": seconds}
    print(
        f"{info.arch}{' (EMA)' if info.ema else ''} on {args.data_set} at "
        f"{args.input_size[0]}x{args.input_size[1]}, {results['images']} images: "
        f"loss {results['loss']:.4f}, acc@1 {results['acc1']:.2f} %, "
        f"acc@5 {results['acc5']:.2f} %, mean per class {results['mean_per_class']:.2f} %, "
        f"{results['images_per_second']:.1f} images/s"
    )
    setting = {
        "model_path": str(info.path),
        "arch": info.arch,
        "model_kwargs": info.model_kwargs,
        "ema": info.ema,
        "data_set": args.data_set,
        "data_path": args.data_path,
        "input_size": args.input_size,
        "crop_pct": data.crop_pct,
        "interpolation": data.interpolation,
        "mean": data.mean,
        "std": data.std,
        "batch_size": args.batch_size,
        "processes": dist.world_size,
        "device": str(dist.device),
        "amp": args.amp,
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    atomic_write(output, json.dumps(results | setting, indent=2, default=str) + "\n")
    print(f"results: {output}")
    if args.report is not None:
        write_report(args.report, pairs, [info.class_name(i) for i in range(info.num_classes)])
        print(f"report: {args.report}")


def check_classes(args: argparse.Namespace, data: Data, info: ModelInfo) -> None:
    """Raise UserError unless the data's classes are the model's."""
    if data.num_classes != info.num_classes:
        raise UserError(
            f"--data-set {args.data_set} has {data.num_classes} classes, {info.path} knows "
            f"{info.num_classes}; --classes chooses some of a data set's"
        )
    if info.class_names is not None and info.class_names != tuple(data.class_names):
        i = next(i for i, name in enumerate(info.class_names) if name != data.class_names[i])
        raise UserError(
            f"--data-set {args.data_set}: its class {i} is {data.class_names[i]!r}, for {info.path} "
            f"it is {info.class_names[i]!r}; --classes chooses classes and their order"
        )


def check_replaceable(path: Path) -> None:
    """Raise UserError if `path` is there and is not a results file of an earlier evaluation."""
    try:
        is_results = not path.exists() or "model_path" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_results = False
    if not is_results:
        raise UserError(f"--output {path}: it is there and holds no results of infer.py; name another file")


def class_accuracies(pairs: np.ndarray, classes: int) -> np.ndarray:
    """The part of each class's images that were recognised, from (2, images); NaN where there are none."""
    true, predicted = pairs
    images = np.bincount(true, minlength=classes)
    correct = np.bincount(true[true == predicted], minlength=classes)
    return np.divide(correct, images, out=np.full(classes, np.nan), where=images > 0)


# ---------------------------------------------------------------------------------------------------- reports


def write_report(folder: Path, pairs: np.ndarray, names: Sequence[str]) -> None:
    """`confusion_matrix.csv`, `confusion_matrix.png` and `per_class.csv`, the worst class first."""
    classes = len(names)
    confusion = np.bincount(pairs[0] * classes + pairs[1], minlength=classes**2).reshape(classes, classes)
    write_csv(
        folder / "confusion_matrix.csv",
        ["true \\ predicted", *names],
        [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)],
    )
    accuracies, images = class_accuracies(pairs, classes), confusion.sum(1)
    rows = [
        [
            i,
            names[i],
            images[i],
            confusion[i, i],
            f"{100 * accuracies[i]:.2f}",
            most_confused(confusion, i, names),
        ]
        for i in np.argsort(accuracies, kind="stable")  # NaN comes last
    ]
    header = ["index", "class", "images", "correct", "accuracy", "most often taken for"]
    write_csv(folder / "per_class.csv", header, rows)
    save_figure(folder / "confusion_matrix.png", draw_confusion(confusion, names))


def most_confused(confusion: np.ndarray, index: int, names: Sequence[str]) -> str:
    """The other class for which a class is taken most often, or nothing."""
    others = confusion[index].copy()
    others[index] = 0
    return names[others.argmax()] if others.any() else ""


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    atomic_write(path, text.getvalue())


def draw_confusion(confusion: np.ndarray, names: Sequence[str]) -> Figure:
    """The confusion matrix, each row in per cent of its true class.

    Few classes have names and counts. Many have neither: the commonest confusions are then listed beside it.
    """
    classes = len(names)
    side = min(max(0.42 * classes, 2.8), 8.0)
    listed = classes > COUNTED_CLASSES
    figure = Figure(figsize=(side + 1.6 + (5.0 if listed else 0.0), side + 1.0), layout="constrained")
    panels = figure.subplots(1, 2 if listed else 1, width_ratios=[side, 3.4] if listed else None, squeeze=False)[0]
    axes = panels[0]
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    scale = PowerNorm(0.5, 0, 100) if listed else Normalize(0, 100)
    image = axes.imshow(share, cmap="Blues", norm=scale, interpolation="nearest")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= NAMED_CLASSES:
        size = 9 if classes <= COUNTED_CLASSES else 5.5
        short = [name if len(name) <= 24 else f"{name[:23]}…" for name in names]
        upright = max(map(len, short)) <= 3
        axes.set_xticks(
            range(classes),
            short,
            fontsize=size,
            rotation=0 if upright else 45,
            ha="center" if upright else "right",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(classes), short, fontsize=size)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
    if not listed:
        for (i, j), count in np.ndenumerate(confusion):
            if count:
                axes.text(
                    j,
                    i,
                    f"{count}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="w" if share[i, j] > 55 else "k",
                )
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02)
    bar.set_label("% of the true class")
    bar.outline.set_visible(False)
    if listed:
        list_confusions(panels[1], confusion, names)
    return figure


def list_confusions(axes: Any, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Bars: the pairs of classes that are confused most often."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(errors, axis=None, kind="stable")[::-1][:SHOWN_CONFUSIONS]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, errors.shape), strict=True) if errors[i, j]]
    axes.barh(range(len(pairs)), [errors[pair] for pair in pairs], color="#4a90c2", height=0.7)
    axes.set_yticks(range(len(pairs)), [f"{names[i]} as {names[j]}" for i, j in pairs], fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("images")
    axes.set_title("commonest confusions", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure in the format of the file's extension."""
    options = {"format": path.suffix[1:], "dpi": 200, "bbox_inches": "tight", "pad_inches": 0.05}
    atomic_write(path, lambda file: figure.savefig(file, **options))


# ------------------------------------------------------------------------------------------------- prediction


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
        check_replaceable(args.output)
    transform = build_transform(
        False, args.input_size, crop_pct=args.eval_crop_pct, interpolation=info.interpolation, normalize=False
    )
    loader = EvalLoader(
        KeyedDataset(Photographs(files), transform, seed=0),
        LoaderSettings(args.batch_size, args.num_workers, args.pin_mem, dist, info.mean, info.std),
    )
    precision = choose_precision(args, dist.device)

    def predict(images: Tensor) -> Tensor:
        with precision.autocast():
            return model(as_input(images, precision)).float()

    records = []
    for batch in loader:
        best = predict(batch.images).softmax(1).topk(min(TOP, info.num_classes))
        for image, index, probabilities, classes in zip(batch.images, batch.indices, *best, strict=True):
            records.append(describe_prediction(files[index], probabilities.tolist(), classes.tolist(), info))
            if overlays:
                target = int(classes[0])
                maps = {"drop when hidden": class_evidence(predict, image, target, args.batch_size)}
                if isinstance(model, ImageModel):
                    with precision.autocast():
                        activation = class_activation(model, as_input(image[None], precision), target)
                    maps = {f"class activation, {'x'.join(map(str, activation.shape))}": activation} | maps
                figure = draw_overlay(displayable(image, info), maps, records[-1]["classes"][0])
                save_figure(overlays[index], figure)
                print(f"    overlay: {overlays[index]}")
    if args.output is not None:
        content = {"model_path": str(info.path), "arch": info.arch, "ema": info.ema, "predictions": records}
        atomic_write(args.output, json.dumps(content, indent=2) + "\n")


def describe_prediction(file: Path, probabilities: list[float], classes: list[int], info: ModelInfo) -> dict[str, Any]:
    """Print an image's likeliest classes, and return them."""
    print(file)
    told = [
        {"index": i, "class": info.class_name(i), "probability": p} for p, i in zip(probabilities, classes, strict=True)
    ]
    for entry in told:
        print(f"    {100 * entry['probability']:6.2f} %  {entry['class']}")
    return {"image": str(file), "classes": told}


# ------------------------------------------------------------------------------------------------ explanation


def overlay_paths(files: Sequence[Path], folder: Path) -> list[Path]:
    """Where the overlays go; UserError if two images would share one, or an image be replaced."""
    paths = [folder / f"{file.stem}_explained.png" for file in files]
    taken: dict[Path, Path] = {}
    for file, path in zip(files, paths, strict=True):
        if path in taken:
            raise UserError(f"--explain: {taken[path]} and {file} have the same name; explain them one by one")
        if path.exists() and path.resolve() in {other.resolve() for other in files}:
            raise UserError(f"--explain: the overlay {path} would replace an image that is to be classified")
        taken[path] = file
    make_directory(folder)
    return paths


@torch.no_grad()
def class_evidence(predict: Callable[[Tensor], Tensor], image: Tensor, target: int, batch_size: int = 32) -> Tensor:
    """How much each part of an image spoke for a class: a (rows, columns) map, 1 the most, 0 nothing or against.

    Occlusion (Zeiler and Fergus, 2014, arXiv:1311.2901, section 4.2): squares of 2/7 of the image's sides are
    blurred beyond recognition one after another, and a cell's evidence is the mean drop of the logit over the
    squares that hold it. The logit counts less the mean of all, since a softmax does not see what they share.

    It asks the model itself, unlike maps read off the last tokens (`class_activation`, Grad-CAM and their kin):
    the mixers here are global from the first block on, so what a token holds in the end need not come from its
    place in the image.

    Args:
        predict: images (B, 3, H, W) to logits (B, classes).
        image: (3, H, W), normalised.
        target: the class.
        batch_size: images a call of `predict`.
    """
    rows, columns = (max(HIDDEN, min(CELLS, side // 4)) for side in image.shape[1:])
    row_of, column_of = (
        torch.arange(side, device=image.device) * cells // side
        for side, cells in zip(image.shape[1:], (rows, columns), strict=True)
    )
    places = (rows - HIDDEN + 1, columns - HIDDEN + 1)
    top, left = torch.cartesian_prod(*map(torch.arange, places)).to(image.device).unsqueeze(-1).unbind(1)
    in_rows, in_columns = (row_of - top) // HIDDEN == 0, (column_of - left) // HIDDEN == 0  # (squares, side)
    blurred = blur(image, max(image.shape[1:]) // 4)
    scores = []
    for begin in range(0, len(top), batch_size):
        part = slice(begin, begin + batch_size)
        inside = in_rows[part, :, None] & in_columns[part, None, :]
        scores.append(centred(predict(torch.where(inside[:, None], blurred, image)), target))
    drops = centred(predict(image[None]), target) - torch.cat(scores)
    kernel = torch.ones(1, 1, HIDDEN, HIDDEN, dtype=drops.dtype, device=drops.device)
    sums, counts = (
        nn.functional.conv_transpose2d(values.view(1, 1, *places), kernel)[0, 0]
        for values in (drops, torch.ones_like(drops))
    )
    return relative(sums / counts)


@torch.no_grad()
def class_activation(model: ImageModel, images: Tensor, target: int) -> Tensor:
    """Where the last tokens of one image (1, 3, H, W) say a class: (rows, columns), 1 the most, 0 nothing or against.

    A class activation map (Zhou et al., 2016, arXiv:1512.04150): the tokens' own logits, less the mean of all
    classes. The vanilla models' logits are the mean of these; pyramids read theirs off the class token, and
    those trained with token labels have a classifier of tokens, which is taken.
    """
    grid = model.token_label_size if isinstance(model, models.Pyramid) else model.grid_size
    head = model.aux_head if getattr(model, "aux_head", None) is not None else model.head
    tokens = model.forward_features(images)[0, model.num_prefix_tokens :]
    return relative(centred(head(tokens), target).view(grid))


def relative(heat: Tensor) -> Tensor:
    """Nothing for what is negative, the rest as parts of the largest, on the CPU."""
    heat = heat.float().clamp_min(0).cpu()
    return heat / heat.max().clamp_min(1e-12)


def centred(logits: Tensor, target: int) -> Tensor:
    """(B,) float: the logit of a class less the mean of all."""
    return logits[:, target].float() - logits.float().mean(1)


def blur(image: Tensor, radius: int) -> Tensor:
    """(3, H, W), averaged twice over squares of that many pixels to each side, less at the borders."""
    for _ in range(2):
        rows = nn.functional.avg_pool2d(image, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        image = nn.functional.avg_pool2d(rows, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)
    return image


def displayable(image: Tensor, info: ModelInfo) -> Tensor:
    """A normalised (3, H, W) image as (H, W, 3) between 0 and 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (info.mean, info.std))
    return (image.detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def draw_overlay(image: Tensor, maps: Mapping[str, Tensor], prediction: Mapping[str, Any]) -> Figure:
    """The image (H, W, 3) as the model saw it, and under each map's name the map (h, w) over it."""
    height, width = image.shape[:2]
    panels = 1 + len(maps)
    figure = Figure(figsize=(panels * 2.6 * min(width / height, 2) + 0.6, 3.1), layout="constrained")
    left, *others = figure.subplots(1, panels)
    left.imshow(image.numpy(), interpolation="nearest")
    left.set_title("input", fontsize=9)
    for axes, (name, heat) in zip(others, maps.items(), strict=True):
        enlarged = nn.functional.interpolate(heat[None, None], (height, width), mode="bilinear")[0, 0]
        # Colours that differ in hue, half transparent over middle greys, can still be told from the image below.
        axes.imshow(0.2 + 0.8 * image.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        colours = axes.imshow(enlarged.numpy(), cmap="turbo", alpha=0.5, vmin=0, vmax=1)
        axes.set_title(name, fontsize=9)
    for axes in (left, *others):
        axes.set_axis_off()
    figure.suptitle(f"{prediction['class']} ({100 * prediction['probability']:.1f} %)", fontsize=10)
    bar = figure.colorbar(colours, ax=others[-1], fraction=0.046, pad=0.02, ticks=[0, 0.5, 1])
    bar.set_label("relative", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure


# ------------------------------------------------------------------------------------------------ the command


def build_parser() -> Parser:
    parser = Parser(
        description="Evaluate a checkpoint on a data set, or classify images with it.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = (group := parser.add_argument_group("model")).add_argument
    add("--model-path", type=Path, required=True, metavar="CKPT", help="of training, or the authors'")
    add("--arch", metavar="NAME", help="where the checkpoint neither says nor shows it")
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="constructor arguments beside the checkpoint's",
    )
    switch(group, "--ema", None, "use the average of the weights (default: if the checkpoint has one)")
    add(
        "--input-size",
        type=image_size,
        metavar="PIXELS",
        help="side, or HEIGHTxWIDTH (default: the checkpoint's); weights are resized",
    )

    add = (group := parser.add_argument_group("evaluation")).add_argument
    add(
        "--data-set",
        metavar="NAME",
        help="as in training (default: the one the checkpoint was trained on, or IMNET)",
    )
    add("--data-path", metavar="DIR", help="where the data set lies")
    add(
        "--classes",
        type=class_list,
        metavar="A,B,...",
        help="only these classes, in this order (default: as in training)",
    )
    add(
        "--inat-category",
        default="name",
        metavar="RANK",
        help="what INAT19 classifies: %(choices)s",
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"],
    )
    add("--report", type=Path, metavar="DIR", help="write the confusion matrix and accuracies per class there")

    add = (group := parser.add_argument_group("prediction")).add_argument
    add("--image", type=Path, nargs="+", metavar="FILE", help="images, or folders of images, to classify")
    add(
        "--explain",
        nargs="?",
        const="",
        metavar="DIR",
        help="save what spoke for the class, over the image: class activation, and the logit's drop where the "
        "image is hidden (default: explained/ beside the checkpoint)",
    )

    add = (group := parser.add_argument_group("both")).add_argument
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="results as JSON (default: beside the checkpoint; for --image none)",
    )
    add(
        "--eval-crop-pct",
        type=FRACTION,
        metavar="P",
        help="part of the resized side that is kept (default: as trained)",
    )
    add("--batch-size", type=POSITIVE, default=128, metavar="N", help="images a process and step")
    add(
        "--num-workers",
        type=COUNT,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="loader processes; 0: load in this one",
    )
    switch(group, "--pin-mem", True, "page-locked batches, for faster copies to a GPU")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--amp",
        default="auto",
        choices=["auto", "bf16", "fp16", "none"],
        help="mixed precision; auto: on CUDA, bf16 where the GPU has it",
    )
    parser.set_defaults(dtype="float32")
    return parser


def settle(args: argparse.Namespace, info: ModelInfo) -> argparse.Namespace:
    """The arguments with what was left open taken from the checkpoint."""
    trained_on = info.args.get("data_set")
    data_set = args.data_set or trained_on or "IMNET"
    classes = info.args.get("classes") if args.classes is None and data_set == trained_on else args.classes
    settled = {
        "data_set": data_set,
        "classes": classes,
        "input_size": info.input_size,
        "eval_crop_pct": args.eval_crop_pct or info.crop_pct,
    }
    return argparse.Namespace(**vars(args) | settled)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args([dashed(word) for word in (sys.argv[1:] if argv is None else argv)])
    if args.explain is not None and args.image is None:
        raise UserError("--explain needs --image")
    if args.image is not None and (args.data_set or args.data_path or args.report):
        raise UserError("--image classifies images; --data-set, --data-path and --report are for evaluation")
    dist = init_distributed(args.device)
    if args.image is not None and dist.world_size > 1:
        raise UserError("--image runs in one process")
    model, info = build_from_checkpoint(
        args.model_path, args.arch, ema=args.ema, input_size=args.input_size, model_kwargs=args.model_kwargs
    )
    model = model.to(dist.device)
    if info.model_kwargs.get("in_chans", 3) != 3:
        raise UserError(f"{info.path}: for images of {info.model_kwargs['in_chans']} channels, these have 3")
    run = run_evaluation if args.image is None else run_prediction
    run(settle(args, info), dist, model, info)


if __name__ == "__main__":
    run_cli(main)
