"""Load weights into a model: unwrap layouts, convert names, resample sizes, and report mismatches."""

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

from .checkpoints import CheckpointError, StateDict, check_model_kwargs, read_checkpoint, unwrap
from .convert import to_ours
from .layers import GridMixer
from .resampling import Grid, resize_pos_embed

_WAVELET_FILTER = re.compile(r"(^|\.)(xfm|ifm)\.")
_logger = logging.getLogger(__name__)


class WeightMismatch(ValueError):
    """A checkpoint does not fit the model; the message names the first keys in one line."""


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """Convert a checkpoint of the authors or of this project, in any known layout, to a state dict for `model`.

    It renames weights, drops constant wavelet filters and an `aux_head` that the model lacks, and resamples weights
    that depend on the grid. Loading the state dict reports the remaining mismatches.
    """
    weights = unwrap(state_dict)
    if not hasattr(model, "design"):  # a model of timm
        return weights
    weights = {name: value for name, value in to_ours(weights).items() if not _WAVELET_FILTER.search(name)}
    if getattr(model, "aux_head", None) is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("aux_head.")}
    return _resize(weights, model)


def pretrained_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """`checkpoint_filter_fn` for timm's `pretrained=True`, after comparing the model's design with the file's.

    Weights for another image size are resampled with a warning. Some other differences keep the shapes of all weights,
    or only change the grid, so loading alone would not notice them.

    Raises:
        CheckpointError: if the file's weights belong to another model; the message shows how to load them.
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
            raise CheckpointError(
                f"{file}: its weights are of another model (different {', '.join(different)}), {arch} with "
                f"{kwargs}: pass these to timm, or load the file with models.load_checkpoint({file!r})"
            )
    size = tuple(described.get("input_size") or model.img_size)
    if size != tuple(model.img_size):
        _logger.warning(f"{file}: resampling weights for images of {size} pixels to {tuple(model.img_size)}")
    return checkpoint_filter_fn(state_dict, model)


def _resize(weights: StateDict, model: nn.Module) -> StateDict:
    weights = dict(weights)
    if "pos_embed" in weights and hasattr(model, "pos_embed"):
        source = source_grid(weights, model.grid_size)
        if source is not None:
            weights["pos_embed"] = resize_pos_embed(weights["pos_embed"], source, model.grid_size)
    for prefix, module in model.named_modules():
        if isinstance(module, GridMixer):
            for name in [name for name in weights if name.startswith(f"{prefix}.")]:
                own_name = name.removeprefix(f"{prefix}.")
                weights[name] = module.resize_weight(own_name, weights[name], module.grid_size)
    return weights


def source_grid(weights: StateDict, model_grid: Grid) -> Grid | None:
    """Infer the grid of a file's position embeddings: from its filters, else the model's grid, else a square."""
    tokens = weights["pos_embed"].shape[1]
    prefixes = {name.rpartition(".")[0] for name in weights}
    candidates = {grid for prefix in prefixes for grid in filter_grids(weights, prefix)}
    grids = [*sorted(candidates, key=lambda grid: (grid != model_grid, grid)), model_grid, (math.isqrt(tokens),) * 2]
    return next((grid for grid in grids if math.prod(grid) == tokens), None)


def filter_grids(weights: StateDict, mixer: str) -> list[Grid]:
    """Return the grids that the weights of the mixer with this name prefix can belong to.

    A gate has W // 2 + 1 columns for both an even and an odd width. Low-pass weights have both sides rounded up to even
    numbers.
    """
    gate, low_pass = weights.get(f"{mixer}.complex_weight"), weights.get(f"{mixer}.low_pass")
    if gate is not None:
        rows, columns = gate.shape[0], 2 * gate.shape[1] - 2
        return [(rows, columns), (rows, columns + 1)]
    if low_pass is not None:
        rows, columns = low_pass.shape[:2]
        return [(rows - odd_height, columns - odd_width) for odd_height in (0, 1) for odd_width in (0, 1)]
    return []


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a timm model's classifiers."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    return (names,) if isinstance(names, str) else tuple(names)


def load_weights(model: nn.Module, state_dict: Mapping, new_head: bool = False) -> list[str]:
    """Load a checkpoint into any timm model, converted by `checkpoint_filter_fn`; return the names not loaded.

    With `new_head`, the file's classifiers are ignored and the model keeps its own. All other weights must be present.

    Raises:
        WeightMismatch: if weights are missing, unexpected or of another shape; some may have been loaded before the
            error.
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
    """Adapt the first convolution from RGB images to the model's number of channels, as timm does."""
    first = f"{(getattr(model, 'pretrained_cfg', None) or {}).get('first_conv')}.weight"
    stem, wanted = weights.get(first), model.state_dict().get(first)
    if stem is None or wanted is None or stem.shape[1] != 3 or wanted.shape[1] == 3:
        return weights
    return weights | {first: adapt_input_conv(wanted.shape[1], stem)}
