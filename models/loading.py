"""Weights into a model: layouts unwrapped, names converted, sizes resampled, and what does not fit named."""

import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from .checkpoints import unwrap
from .convert import StateDict, to_ours
from .layers import Grid, GridMixer

_WAVELET_FILTER = re.compile(r"(^|\.)(xfm|ifm)\.")
_HEADS = ("head", "aux_head")


class WeightMismatch(ValueError):
    """A checkpoint does not fit the model; the message names the keys in one line."""


def checkpoint_filter_fn(state_dict: Mapping, model: nn.Module) -> StateDict:
    """A checkpoint of the authors or of ours, in any of the known layouts, as a state dict for `model`.

    Renames, drops the wavelet filters some files hold and an `aux_head` the model has not, and resamples what
    depends on the grid to the model's. What remains wrong is left for the loading to report.
    """
    weights = unwrap(state_dict)
    if not hasattr(model, "checkpoint_format"):
        return weights
    weights = {name: value for name, value in to_ours(weights).items() if not _WAVELET_FILTER.search(name)}
    if getattr(model, "aux_head", None) is None:
        weights = {name: value for name, value in weights.items() if not name.startswith("aux_head.")}
    return _resize(weights, model)


def _resize(weights: StateDict, model: nn.Module) -> StateDict:
    weights = dict(weights)
    if "pos_embed" in weights and hasattr(model, "pos_embed"):
        source = _source_grid(weights, model.grid_size)
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


def _source_grid(weights: StateDict, model_grid: Grid) -> Grid | None:
    """The grid of a file's position embeddings: told by its filters, else the model's, else a square."""
    tokens = weights["pos_embed"].shape[1] if weights["pos_embed"].ndim == 3 else 0
    told = {grid for name, weight in weights.items() for grid in _told_grids(name, weight, tokens)}
    grids = [*sorted(told, key=lambda grid: (grid != model_grid, grid)), model_grid, (math.isqrt(tokens),) * 2]
    return next((grid for grid in grids if tokens and math.prod(grid) == tokens), None)


def _told_grids(name: str, weight: Tensor, tokens: int) -> list[Grid]:
    """What a weight tells of the grid: a gate the number of rows, a low-pass weight both sides, made even."""
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
    weights = checkpoint_filter_fn(state_dict, model)
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
