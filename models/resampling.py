"""Weights that depend on the token grid, resampled to another one, and kept while they do not change."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

GRIDS_KEPT = 4  # of each weight; images of a data set have a few usual sizes, and a filter is megabytes

# The weight, so that nothing else takes its id, and what was made of it by size.
_kept: dict[int, tuple[Tensor, OrderedDict[tuple[int, ...], Tensor]]] | None = None


@contextmanager
def keep_resampled() -> Iterator[None]:
    """Without gradients, resample a weight once for each of the last few grids. No weight may change meanwhile."""
    global _kept
    before, _kept = _kept, {}
    try:
        yield
    finally:
        _kept = before


def resampled(rule: Callable[[Tensor, tuple[int, ...]], Tensor], weight: Tensor, size: tuple[int, ...]) -> Tensor:
    """`rule` of `weight` and `size`, or what is kept of it."""
    if _kept is None or torch.is_grad_enabled():
        return rule(weight, size)
    by_size = _kept.setdefault(id(weight), (weight, OrderedDict()))[1]
    if size not in by_size:
        by_size[size] = rule(weight, size)
    by_size.move_to_end(size)
    if len(by_size) > GRIDS_KEPT:
        by_size.popitem(last=False)
    return by_size[size]
