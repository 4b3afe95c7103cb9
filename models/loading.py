"""Weights into a model: layouts unwrapped, names converted, sizes resampled, and what does not fit named."""

import logging
import math
import os
import re
from collections.abc import Iterable, Mapping

import timm
import torch
from timm.layers import DropPath
from timm.models import adapt_input_conv
from torch import Tensor, nn

from .checkpoints import CheckpointError, check_model_kwargs, read_checkpoint, unwrap
from .convert import StateDict, to_ours
from .layers import GridMixer
from .resampling import Grid

_WAVELET_FILTER = re.compile(r"(^|\.)(xfm|ifm)\.")
_HEADS = ("head", "aux_head")
# Settings with which a model can differ from the one that its weights were trained in.
_FREE = {
    "training",
    "num_classes",
    "in_chans",
    "in_channels",
    "inplace",
    "token_label",
    "global_pool",
    "dynamic_img_size",
    "grad_checkpointing",
    "spectral_precision",
}
_FREE_LAYERS = (nn.Identity, nn.Dropout, DropPath)
_logger = logging.getLogger(__name__)


class WeightMismatch(ValueError):
    """A checkpoint does not fit the model; the message names the keys in one line."""


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """A checkpoint of the authors or of ours, in any of the known layouts, as a state dict for `model`.

    Renames entries, drops constant wavelet filters and an `aux_head` that the model does not have, and resamples what
    depends on the grid to the model's. What remains wrong is left for the loading to report.
    """
    weights = unwrap(state_dict)
    if not hasattr(model, "checkpoint_format"):
        return weights
    weights = {name: value for name, value in to_ours(weights).items() if not _WAVELET_FILTER.search(name)}
    if getattr(model, "aux_head", None) is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("aux_head.")}
    return _resize(weights, model)


def pretrained_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """`checkpoint_filter_fn` for timm's `pretrained=True`, after comparing the model with what the file describes.

    Weights of another image size are resampled, and logged. Other arguments can leave the weights' shapes as they are,
    or change the grid only, and would go unnoticed.

    Raises:
        CheckpointError: the file says that its weights are of another model; the message shows the call for them.
    """
    file = model.pretrained_cfg.get("file")
    described = read_checkpoint(file) if file and os.path.isfile(file) else {}
    arch, kwargs = described.get("arch"), described.get("model_kwargs") or {}
    if arch is not None and timm.is_model(arch) and hasattr(model, "checkpoint_format"):
        check_model_kwargs(kwargs, f"{file}: model_kwargs")
        with torch.device("meta"):
            expected = timm.create_model(arch, **kwargs | {"img_size": model.img_size})
        if (difference := _difference(expected, model)) is not None:
            arguments = "".join(f", {name}={value!r}" for name, value in kwargs.items())
            raise CheckpointError(
                f"{file}: its weights are of another model ({difference}); load it by models.load_checkpoint({file!r}) "
                f"or timm.create_model({arch!r}, pretrained=True, pretrained_cfg_overlay=dict(file={file!r}, "
                f"num_classes={described.get('num_classes')}){arguments})"
            )
    size = tuple(described.get("input_size") or model.img_size)
    if size != tuple(model.img_size):
        shown = ["x".join(map(str, sides)) for sides in (size, model.img_size)]
        _logger.warning(f"{file}: weights for images of {shown[0]} pixels are resampled to {shown[1]}")
    return checkpoint_filter_fn(state_dict, model)


def _difference(expected: nn.Module, model: nn.Module) -> str | None:
    """The first module or setting in which two models differ, but for classifiers, stem channels and regularisation."""
    theirs, ours = (
        {
            f"{name}.{key}": value
            for name, module in built.named_modules()
            if not name.startswith((*_HEADS, "class_block", "norm"))  # features_only has none
            for key, value in ({"type": type(module).__name__} | vars(module)).items()
            if isinstance(value, int | str | tuple) and key not in _FREE and not isinstance(module, _FREE_LAYERS)
        }
        for built in (expected, model)
    )
    for key in theirs | ours:
        if theirs.get(key) != ours.get(key):
            return f"{key.removeprefix('.')} is {theirs.get(key)}, not {ours.get(key)}"
    return None


def _resize(weights: StateDict, model: nn.Module) -> StateDict:
    weights = dict(weights)
    if "pos_embed" in weights and hasattr(model, "pos_embed"):
        source = source_grid(weights, model.grid_size)
        if source is not None:
            weights |= model.resize_weights(weights, source)
    for prefix, module in model.named_modules():
        if not (prefix.endswith(".mixer") and isinstance(module, GridMixer)):
            continue
        start = f"{prefix}."
        own = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        resized = module.resize_weights(own, module.grid_size)
        weights |= {start + name: value for name, value in resized.items()}
    return weights


def source_grid(weights: StateDict, model_grid: Grid) -> Grid | None:
    """The grid of a file's position embeddings: given by its filters, else the model's, else a square."""
    tokens = weights["pos_embed"].shape[1] if weights["pos_embed"].ndim == 3 else 0
    candidates = {grid for name, weight in weights.items() for grid in _possible_grids(name, weight, tokens)}
    grids = [*sorted(candidates, key=lambda grid: (grid != model_grid, grid)), model_grid, (math.isqrt(tokens),) * 2]
    return next((grid for grid in grids if tokens and math.prod(grid) == tokens), None)


def _possible_grids(name: str, weight: Tensor, tokens: int) -> list[Grid]:
    """The grids that a weight fits: a gate gives the number of rows, a low-pass weight both sides, made even."""
    if name.endswith("mixer.complex_weight") and weight.ndim == 4:
        return [(weight.shape[0], tokens // max(weight.shape[0], 1))]
    if name.endswith("mixer.low_pass") and weight.ndim == 3:
        height, width, _ = weight.shape
        return [(rows, columns) for rows in (height, height - 1) for columns in (width, width - 1)]
    return []


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's classifiers."""
    if hasattr(model, "checkpoint_format"):
        return _HEADS
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def load_weights(model: nn.Module, state_dict: Mapping, new_head: bool = False) -> list[str]:
    """Load a checkpoint into a model of this project or any other timm model; returns what it left untouched.

    Converts names, unwraps layouts and resamples as `checkpoint_filter_fn`. With `new_head` the file's
    classifiers are ignored and exactly those of the model may be missing.

    Raises:
        WeightMismatch: anything else is missing, unexpected or of another shape. The model is as it was.
    """
    weights = _adapt_channels(checkpoint_filter_fn(state_dict, model), model)
    heads = tuple(f"{name}." for name in classifier_names(model))
    if new_head:
        weights = {name: value for name, value in weights.items() if not name.startswith(heads)}
    expected = model.state_dict()
    missing = [name for name in expected if name not in weights]
    untouched = [name for name in missing if new_head and name.startswith(heads)]
    problems = [
        _listed("missing", [name for name in missing if name not in untouched]),
        _listed("unexpected", [name for name in weights if name not in expected]),
        _listed("of another shape", _misshapen(weights, expected)),
    ]
    if any(problems):
        raise WeightMismatch("the weights do not fit the model: " + "; ".join(filter(None, problems)))
    model.load_state_dict(weights, strict=False)
    return untouched


def _adapt_channels(weights: StateDict, model: nn.Module) -> StateDict:
    """The weights with a first convolution of RGB images adapted to the model's number of channels, as timm does."""
    first = f"{(getattr(model, 'pretrained_cfg', None) or {}).get('first_conv')}.weight"
    stem, wanted = weights.get(first), model.state_dict().get(first)
    if stem is None or wanted is None or stem.ndim != 4 or stem.shape[1] != 3 or wanted.shape[1] == 3:
        return weights
    return weights | {first: adapt_input_conv(wanted.shape[1], stem)}


def _misshapen(weights: Mapping, expected: Mapping[str, Tensor]) -> Iterable[str]:
    for name, value in weights.items():
        if name not in expected:
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(expected[name].shape):
            yield f"{name} ({shape}, not {tuple(expected[name].shape)})"


def _listed(what: str, names: Iterable[str], limit: int = 5) -> str:
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return f"{what}: {', '.join(names[:limit])}{more}"
