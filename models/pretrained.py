"""Load models with weights, by name, from a run directory or from a checkpoint file."""

from __future__ import annotations

import difflib
import os
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import Tensor, nn

from . import spectformer, svt
from .checkpoints import EMA_KEYS, PREPROCESSING, CheckpointError, check_model_kwargs, read_checkpoint, weights_of
from .convert import to_ours
from .layers import GridMixer
from .loading import WeightMismatch, filter_grids, load_weights, source_grid
from .resampling import Grid, to_grid

# All model names that this package registers.
ARCHITECTURES = tuple(name for family in (spectformer, svt) for name in family.default_cfgs)
BEST, LAST = "checkpoint_best.pth", "checkpoint_last.pth"  # of a run directory


class ModelError(ValueError):
    """The model does not exist or does not accept the arguments; the message is one line."""


def resolve_arch(name: str) -> str:
    """Convert the papers' spelling ("spectformer-xs", "SpectFormer-H-S") to a model's registered name.

    Replaces hyphens by underscores in other names, which timm then checks, and returns "hf-hub:..." unchanged.
    """
    if ":" in name or "/" in name:
        return name
    plain = name.replace("-", "_")
    ours = {"spectformer_t": "spectformer_ti"}.get(plain.lower(), plain.lower())
    return ours if ours in ARCHITECTURES else plain


def shipped() -> dict[str, Path]:
    """Return the weight files included in this package, by model name."""
    files = {name: get_pretrained_cfg(name).file for name in ARCHITECTURES}
    return {name: Path(file) for name, file in files.items() if file is not None}


def find_checkpoint(source: str | os.PathLike) -> Path:
    """Return the checkpoint of a source: a file, a run directory (its best one), or a model with included weights.

    Raises:
        CheckpointError: if the source is none of these.
    """
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / name for name in (BEST, LAST) if (path / name).is_file()), None)
        if found is None:
            raise CheckpointError(f"{path}: this directory has neither {BEST} nor {LAST}")
        return found
    weights = shipped()
    if (name := resolve_arch(os.fspath(source))) in weights:
        return weights[name]
    raise CheckpointError(
        f"{source}: no such file or run directory, and this project has no weights for a model of that name, "
        f"only for {', '.join(weights)}"
    )


def create_model(arch: str, num_classes: int, input_size: Grid | None, model_kwargs: Mapping[str, Any]) -> nn.Module:
    """Create any registered model, from this project or timm, without pretrained weights.

    `input_size` is (height, width) in pixels, ignored by models without a fixed size; None for the model's default.

    Raises:
        ModelError: if the model does not exist or does not accept the arguments.
    """
    name = resolve_arch(arch)
    check_model(name)
    arguments = dict(model_kwargs)
    try:
        if input_size is not None and get_pretrained_cfg(name, allow_unregistered=False).fixed_input_size:
            arguments = {"img_size": input_size} | arguments
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # from layers without weights
            return timm.create_model(name, num_classes=num_classes, **arguments)
    except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError, OverflowError) as error:
        raise ModelError(f"{name} with {arguments}: {' '.join(str(error).split())}") from error


def check_model(name: str) -> None:
    """Raise ModelError, which names the most similar model, if no model is registered under this name."""
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise ModelError(f"{name}: no such model" + (f"; did you mean {close[0]}?" if close else ""))


@dataclass(frozen=True)
class LoadedModel:
    """A classifier with its weights and the metadata of its checkpoint.

    Attributes:
        model: the model in evaluation mode, on the CPU.
        path: the checkpoint file.
        arch, model_kwargs: the model's registered name and constructor arguments.
        class_names: the class names in the order of the logits. If the file has none, ImageNet's WordNet ids for 1000
            classes, otherwise numbers.
        input_size: (height, width) of the model's input.
        mean, std, crop_pct, interpolation: the settings of `transform`.
        ema: whether the weights are the averaged (EMA) ones.
        checkpoint: the file's content, as returned by `read_checkpoint`.
    """

    model: nn.Module
    path: Path
    arch: str
    model_kwargs: dict[str, Any]
    class_names: tuple[str, ...]
    input_size: Grid
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    ema: bool
    checkpoint: dict[str, Any]

    @cached_property
    def transform(self) -> Callable[[Image.Image], Tensor]:
        """Timm's evaluation transform, from an RGB image to the model's input (3, H, W)."""
        return create_transform(self.input_size, **{name: getattr(self, name) for name in PREPROCESSING})

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def label(self, index: int) -> str:
        """Return a class's name. An ImageNet WordNet id is followed by its first description."""
        return describe_class(self.class_names[index])


def describe_class(name: str) -> str:
    """Convert an ImageNet WordNet id, ``"n01440764"`` to ``"n01440764 tench"``; return other names unchanged."""
    return " ".join([name, *synonyms(name)[:1]])


def synonyms(name: str) -> list[str]:
    """Return the words for a class named by an ImageNet WordNet id: ``["tench", "Tinca tinca"]``."""
    try:
        return imagenet().label_name_to_description(name, detailed=False).split(", ")
    except KeyError:
        return []


@cache
def imagenet() -> ImageNetInfo:
    return ImageNetInfo()


def load_checkpoint(
    path: str | os.PathLike,
    arch: str | None = None,
    *,
    ema: bool | None = None,
    input_size: int | Grid | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """Load a classifier with its weights, transform and class names, ready for prediction.

        loaded = models.load_checkpoint("runs/my_photographs")
        logits = loaded.model(loaded.transform(image)[None])

    Args:
        path: a checkpoint from this project, the original authors or timm; a run directory (its best checkpoint); or
            the name of a model whose weights this project includes.
        arch: the model's name, for a file that only contains weights.
        ema: True for the averaged (EMA) weights, False for the trained ones, None for the averaged ones if present.
        input_size: side or (height, width) of the input, by default the checkpoint's. Weights are resampled to it.
        model_kwargs: constructor arguments in addition to the checkpoint's.

    Raises:
        CheckpointError: if the file cannot be used, contradicts the arguments or needs `arch`.
    """
    path = find_checkpoint(path)
    checkpoint = read_checkpoint(path)
    if checkpoint.get("detector"):
        raise CheckpointError(f"{path}: it contains a detector, not a classifier; use infer.py to run it")
    weights = weights_of(checkpoint, ema, path)
    name = model_name(checkpoint, arch, path)
    kwargs = dict(checkpoint.get("model_kwargs") or {})
    check_model_kwargs(kwargs, f"{path}: model_kwargs")
    kwargs |= model_kwargs or {}
    if name in ARCHITECTURES:
        weights = to_ours(weights)
        if "arch" not in checkpoint and "aux_head.weight" in weights:
            kwargs.setdefault("token_label", True)
    cfg = get_pretrained_cfg(name) or PretrainedCfg()
    classes = _class_names(checkpoint, weights, cfg, path)
    own_size = checkpoint.get("input_size") or _native_size(weights, name, kwargs) or cfg.input_size[1:]
    size = to_grid(own_size if input_size is None else input_size)
    try:
        model = create_model(name, len(classes), size, kwargs)
        load_weights(model, weights)
    except (ModelError, WeightMismatch) as error:
        raise CheckpointError(f"{path}: {error}") from error
    preprocessing = {key: checkpoint.get(key) or getattr(cfg, key) for key in PREPROCESSING}
    preprocessing |= {key: tuple(preprocessing[key]) for key in ("mean", "std")}
    averaged = ema is not False and any(checkpoint.get(key) for key in EMA_KEYS)
    return LoadedModel(
        model.eval(), path, name, kwargs, classes, size, **preprocessing, ema=averaged, checkpoint=checkpoint
    )


def model_name(checkpoint: Mapping[str, Any], arch: str | None, path: Path) -> str:
    """Return the name of a checkpoint's model; CheckpointError if there is none or `arch` contradicts it."""
    own, asked = (
        None if name is None else re.sub(r"^svt_(?=[sbl]$)", "svt_h_", resolve_arch(name))  # svt_s is short for svt_h_s
        for name in (checkpoint.get("arch"), arch)
    )
    if own is None and asked is None:
        raise CheckpointError(f"{path}: it only contains weights; set --arch to their model (in Python: arch=...)")
    if own is not None and asked is not None and own != asked:
        raise CheckpointError(f"{path}: it contains {own}, not {arch}; leave out --arch")
    return own or asked


def _class_names(
    checkpoint: Mapping[str, Any], weights: Mapping[str, Tensor], cfg: PretrainedCfg, path: Path
) -> tuple[str, ...]:
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else (cfg.classifier or ("head",))[0]
    if not getattr(weights.get(f"{classifier}.weight"), "ndim", 0):
        raise CheckpointError(f"{path}: it has no classifier {classifier}.weight, so it cannot predict")
    number = len(weights[f"{classifier}.weight"])
    names = checkpoint.get("class_names")
    if names is None:
        names = imagenet().label_names() if number == imagenet().num_classes() else range(number)
    if len(names) != number:
        raise CheckpointError(f"{path}: it names {len(names)} classes, but its classifier has {number}")
    return tuple(str(name) for name in names)


def _native_size(weights: Mapping[str, Tensor], name: str, kwargs: Mapping[str, Any]) -> Grid | None:
    """Infer the image size of weights without metadata; None if they are not ours or do not depend on it.

    It is the grid of the position embeddings, or of a pyramid's first filter, times the stride.
    """
    if name not in ARCHITECTURES:
        return None
    with torch.device("meta"):
        model = create_model(name, 0, None, kwargs)
    if "pos_embed" in weights:
        grid = source_grid(weights, model.grid_size)
        return grid and (grid[0] * model.patch_size, grid[1] * model.patch_size)
    for prefix, module in model.named_modules():
        if isinstance(module, GridMixer) and (grids := filter_grids(weights, prefix)):
            rows, columns = next((grid for grid in grids if grid[0] == grid[1]), grids[0])  # prefer a square
            stride = model.img_size[0] // module.grid_size[0]
            return rows * stride, columns * stride
    return None
