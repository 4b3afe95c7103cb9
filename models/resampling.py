"""Weights that depend on the token grid, resampled to another one, and kept while they do not change."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import full_precision

Grid = tuple[int, int]  # (height, width) in pixels or tokens
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


def resize_image(image: Tensor, size: Grid, align_corners: bool) -> Tensor:
    """Bicubic resampling of a (C, h, w) image to `size`, without antialiasing, in the image's dtype."""
    batch = full_precision(image)[None]
    resized = F.interpolate(batch, size=size, mode="bicubic", align_corners=align_corners)
    return resized[0].to(image.dtype)


def resize_grid(grid: Tensor, size: Grid, align_corners: bool) -> Tensor:
    """`resize_image` for a channels-last (h, w, C) tensor."""
    return resize_image(grid.permute(2, 0, 1), size, align_corners).permute(1, 2, 0).contiguous()


def to_grid(size: int | tuple[int, int] | list[int]) -> Grid:
    """An int or a pair as (height, width) in pixels or tokens.

    Raises:
        ValueError: it is something else.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"a size is a positive int or a pair of them, not {size!r}")
    return pair
