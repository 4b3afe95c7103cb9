"""Label maps as dense targets: what each token of an augmented image sees, for a whole batch on its device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from inputs.label_map_trace import Record
from inputs.label_maps import MAP_SIZE
from utils import UserError


@torch.no_grad()
def dense_targets(
    record: Record, num_classes: int, size: int | tuple[int, int], smoothing: float = 0.1, swapped: bool = False
) -> Tensor:
    """The training targets of a batch, on the device of the record.

    The logits are scattered over zeros, averaged over the region that each token sees by RoIAlign, and put
    through a softmax over the classes. What the augmentation filled from outside the image counts as zero
    logits, like a class that the teacher did not name: a token without any image gets the uniform
    distribution.

    Smoothing s with C classes makes p of a softmax's p the target p·(1 − s + s/C) + s/C, as the reference
    does; a smoothed token target therefore sums to 1 + s/C. The ground truth's sums to 1.

    Args:
        record: collated records of `TokenLabelTransform`.
        size: tokens of the last stage, one side or (height, width).
        swapped: hand RoIAlign its box with x and y exchanged, as the reference does (another region's labels
            for every crop off the diagonal); for exact reproduction only.

    Returns:
        (B, classes, 1 + 1 + h·w): ground truth, class token, tokens row by row. With size 1, whose one token
        is the class token's region, (B, classes, 2).

    Raises:
        UserError: the maps name a class that the data does not have (on a CPU; CUDA stops with an assertion).
    """
    height, width = (size, size) if isinstance(size, int) else size
    with torch.autocast(record["values"].device.type, enabled=False):
        grids = [(1, 1)] if (height, width) == (1, 1) else [(1, 1), (height, width)]
        logits = region_logits(record, num_classes, grids, swapped)
        off = smoothing / num_classes
        on = 1 - smoothing + off
        labels = torch.nn.functional.one_hot(record["label"], num_classes)
        ground_truth = torch.where(labels.bool(), on, off).unsqueeze(2)
        return torch.cat([ground_truth, logits.softmax(1) * on + off], dim=2)


def region_logits(record: Record, num_classes: int, grids: Sequence[tuple[int, int]], swapped: bool = False) -> Tensor:
    """The mean logits of the regions of one or several (h, w) grids over each augmented image.

    Returns:
        (B, classes, sum of the grids' h·w).
    """
    values, indices = record["values"].flatten(2), record["indices"].long().flatten(2)
    if indices.device.type == "cpu" and int(indices.max()) >= num_classes:
        raise UserError(
            f"--token-label-data: a label map names class {int(indices.max())}, and there are "
            f"{num_classes}; python -m tools.generate_token_labels --check finds it"
        )
    dense = values.new_zeros(len(values), num_classes, MAP_SIZE**2).scatter_(1, indices, values)
    weights = [_region_weights(record["crop"], record["affines"], grid, swapped) for grid in grids]
    return dense @ torch.cat(weights, dim=1).mT


def _region_weights(crop: Tensor, affines: Tensor, grid: tuple[int, int], swapped: bool) -> Tensor:
    """What each place of a map counts for in each region, (B, h·w, 18·18).

    RoIAlign (He et al. 2017; ``aligned=False``, adaptive number of samples) averages bilinear samples on a
    regular grid. torchvision's takes upright boxes only; here the same samples go through the affine map
    first. For upright boxes inside the image the two agree.

    Args:
        crop: (B, 4) y, x, height, width as fractions. affines: (B, n, 2, 3).
    """
    top_left = crop[:, :2] if swapped else crop[:, [1, 0]]
    extent = crop[:, 2:] if swapped else crop[:, [3, 2]]
    start = top_left * MAP_SIZE - 0.5  # (B, 2): along x, along y
    extent = ((top_left + extent) * MAP_SIZE - 0.5 - start).clamp(min=1)
    x, weight_x = _sample_places(extent[:, 0], grid[1])
    y, weight_y = _sample_places(extent[:, 1], grid[0])

    # Places in the final image, (B, h, w, samples along y, samples along x), in the crop and in the map.
    x, y = torch.broadcast_tensors(x[:, None, :, None, :], y[:, :, None, :, None])
    weight = weight_x[:, None, :, None, :] * weight_y[:, :, None, :, None]
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    in_frames = torch.einsum("bnij,bhwklj->nbhwkli", affines, places)
    shape = (-1, 1, 1, 1, 1, 2)
    in_map = in_frames[0] * extent.view(shape) + start.view(shape)
    margin = 1e-4  # of a map cell; rounding must not put a sample outside
    inside = ((in_frames >= -margin) & (in_frames <= 1 + margin)).all(dim=0)
    inside = (inside & (in_map >= -0.5 - margin) & (in_map <= MAP_SIZE - 0.5 + margin)).all(dim=-1)

    # Bilinear weights of the 18 columns and the 18 rows; in the outermost half cell the value stays constant.
    cells = torch.arange(MAP_SIZE, device=crop.device)
    hats = (1 - (in_map.clamp(0, MAP_SIZE - 1).unsqueeze(-1) - cells).abs()).clamp(min=0)
    weights = torch.einsum("bhwkl,bhwklr,bhwklc->bhwrc", weight * inside, hats[..., 1, :], hats[..., 0, :])
    return weights.flatten(3).flatten(1, 2)


def _sample_places(extent: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """RoIAlign's samples along one axis: as many a bin as it has map cells, rounded up.

    Args:
        extent: (B,) of the crop, in map cells.

    Returns:
        Places in [0, 1] and their weights, both (B, bins, samples); spare samples weigh 0.
    """
    count = torch.ceil(extent / bins)[:, None, None]
    sample = torch.arange(math.ceil(MAP_SIZE / bins), device=extent.device)
    bin_number = torch.arange(bins, device=extent.device)[:, None]
    places = (bin_number + (sample + 0.5) / count) / bins
    return places, ((sample < count) / count).expand_as(places)
