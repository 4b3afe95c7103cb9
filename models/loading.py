"""Weights into a model: layouts unwrapped, names converted, sizes resampled, and what does not fit named."""

import logging
import math
import os
import re
import textwrap
from collections.abc import Mapping

import timm
import torch
from timm.models import adapt_input_conv
from torch import nn

from .checkpoints import CheckpointError, check_model_kwargs, read_checkpoint, unwrap
from .convert import StateDict, to_ours
from .layers import GridMixer
from .resampling import Grid

_WAVELET_FILTER = re.compile(r"(^|\.)(xfm|ifm)\.")
_HEADS = ("head", "aux_head")
_logger = logging.getLogger(__name__)


def is_ours(model: nn.Module) -> bool:
    """Whether it is a model of this project, whose names and grids the functions below know."""
    return hasattr(model, "design")


class WeightMismatch(ValueError):
    """A checkpoint does not fit the model; the message names the first keys in one line."""


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """A checkpoint of the authors or of ours, in any of the known layouts, as a state dict for `model`.

    Renames entries, drops constant wavelet filters and an `aux_head` that the model does not have, and resamples what
    depends on the grid to the model's. What remains wrong is left for the loading to report.
    """
    weights = unwrap(state_dict)
    if not is_ours(model):
        return weights
    weights = {name: value for name, value in to_ours(weights).items() if not _WAVELET_FILTER.search(name)}
    if getattr(model, "aux_head", None) is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("aux_head.")}
    return _resize(weights, model)


def pretrained_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """`checkpoint_filter_fn` for timm's `pretrained=True`, after comparing the model's design with the file's.

    Weights of another image size are resampled, and logged. Other arguments can leave the weights' shapes as they are,
    or change the grid only, and would go unnoticed.

    Raises:
        CheckpointError: the file says that its weights are of another model; the message shows the call for them.
    """
    file = model.pretrained_cfg.get("file")
    described = read_checkpoint(file) if file and os.path.isfile(file) else {}
    arch, kwargs = described.get("arch"), described.get("model_kwargs") or {}
    if arch is not None and timm.is_model(arch):
        check_model_kwargs(kwargs, f"{file}: model_kwargs")
        with torch.device("meta"):
            design = getattr(timm.create_model(arch, **kwargs | {"img_size": model.img_size}), "design", {})
        different = [name for name in design | model.design if design.get(name) != model.design.get(name)]
        if different:
            arguments = "".join(f", {name}={value!r}" for name, value in kwargs.items())
            raise CheckpointError(
                f"{file}: its weights are of another model ({', '.join(different)}); load it by "
                f"models.load_checkpoint({file!r}) or timm.create_model({arch!r}, pretrained=True, "
                f"pretrained_cfg_overlay=dict(file={file!r}, num_classes={described.get('num_classes')}){arguments})"
            )
    size = tuple(described.get("input_size") or model.img_size)
    if size != tuple(model.img_size):
        shown = ["x".join(map(str, sides)) for sides in (size, model.img_size)]
        _logger.warning(f"{file}: weights for images of {shown[0]} pixels are resampled to {shown[1]}")
    return checkpoint_filter_fn(state_dict, model)


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
    prefixes = {name.rpartition(".")[0] for name in weights}
    candidates = {grid for prefix in prefixes for grid in filter_grids(weights, prefix)}
    grids = [*sorted(candidates, key=lambda grid: (grid != model_grid, grid)), model_grid, (math.isqrt(tokens),) * 2]
    return next((grid for grid in grids if tokens and math.prod(grid) == tokens), None)


def filter_grids(weights: StateDict, mixer: str) -> list[Grid]:
    """The grids that the weights of a mixer of that name can be for.

    A gate keeps half of the columns and one more, so that an odd width looks like an even one. Low-pass weights are for
    a grid that was made even.
    """
    gate, low_pass = weights.get(f"{mixer}.complex_weight"), weights.get(f"{mixer}.low_pass")
    if gate is not None and gate.ndim == 4:
        rows, columns = gate.shape[0], 2 * gate.shape[1] - 2
        return [(rows, columns), (rows, columns + 1)]
    if low_pass is not None and low_pass.ndim == 3:
        rows, columns = low_pass.shape[:2]
        return [(rows - odd_height, columns - odd_width) for odd_height in (0, 1) for odd_width in (0, 1)]
    return []


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a timm model's classifiers."""
    if is_ours(model):
        return _HEADS
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def load_weights(model: nn.Module, state_dict: Mapping, new_head: bool = False) -> list[str]:
    """Load a checkpoint into a model of this project or any other timm model; returns what it left untouched.

    Converts names, unwraps layouts and resamples as `checkpoint_filter_fn`. With `new_head` the file's
    classifiers are ignored and exactly those of the model may be missing.

    Raises:
        WeightMismatch: anything else is missing, unexpected or of another shape; some weights may have been loaded.
    """
    weights = _adapt_channels(checkpoint_filter_fn(state_dict, model), model)
    untouched: StateDict = {}
    if new_head:
        heads = tuple(f"{name}." for name in classifier_names(model))
        weights = {name: value for name, value in weights.items() if not name.startswith(heads)}
        untouched = {name: value for name, value in model.state_dict().items() if name.startswith(heads)}
    try:
        model.load_state_dict(weights | untouched)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error).partition(":")[2], 400, placeholder=" ...")
        raise WeightMismatch(f"the weights do not fit the model: {reason}") from error
    return list(untouched)


def _adapt_channels(weights: StateDict, model: nn.Module) -> StateDict:
    """The weights with a first convolution of RGB images adapted to the model's number of channels, as timm does."""
    first = f"{(getattr(model, 'pretrained_cfg', None) or {}).get('first_conv')}.weight"
    stem, wanted = weights.get(first), model.state_dict().get(first)
    if stem is None or wanted is None or stem.ndim != 4 or stem.shape[1] != 3 or wanted.shape[1] == 3:
        return weights
    return weights | {first: adapt_input_conv(wanted.shape[1], stem)}
