"""Resample weights that depend on the token grid to another grid."""

import torch.nn.functional as F
from torch import Tensor

from .precision import full_precision

Grid = tuple[int, int]  # (height, width) in pixels or tokens


def resize_image(image: Tensor, size: Grid, align_corners: bool = False) -> Tensor:
    """Resample a (C, h, w) image to `size`, bicubic without antialiasing; returns the image's dtype."""
    if image.shape[1:] == size:
        return image
    batch = full_precision(image)[None]
    resized = F.interpolate(batch, size=size, mode="bicubic", align_corners=align_corners)
    return resized[0].to(image.dtype)


def resize_grid(grid: Tensor, size: Grid, align_corners: bool = False) -> Tensor:
    """`resize_image` for a channels-last (h, w, C) tensor."""
    if grid.shape[:2] == size:
        return grid
    return resize_image(grid.permute(2, 0, 1), size, align_corners).permute(1, 2, 0).contiguous()


def resize_pos_embed(pos_embed: Tensor, old: Grid, new: Grid) -> Tensor:
    """Resample position embeddings (1, N, C) to another grid: bicubic, align_corners=False, as the authors do."""
    if old == new:
        return pos_embed
    return resize_grid(pos_embed[0].unflatten(0, old), new).flatten(0, 1)[None]


def to_grid(size: int | tuple[int, int] | list[int]) -> Grid:
    """Convert an int or a pair to (height, width) in pixels or tokens.

    Raises:
        ValueError: if the size is not a positive int or a pair of positive ints.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"a size must be a positive int or a pair of positive ints, not {size!r}")
    return pair
