"""Token labels of augmented images: label maps that follow crops, flips and the geometric operations of RandAugment.

In a worker, `TokenLabelTransform` records where the pixels of an augmented image come from, as a crop box and affine
maps. `dense_targets` applies them to the label maps of a whole batch on its device.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from inputs.label_maps import MAP_SIZE
from utils import UserError

Record = dict[str, Tensor]  # see `TokenLabelTransform.__call__`


def _rotate(width: int, height: int, degrees: float) -> list[list[float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]]


# The matrix from a pixel (x, y, 1) of an operation's output to its source in the input, given the image's width and
# height and, for operations of timm.data.auto_augment, the level. The origin is the corner of the first pixel.
FLIPS = {
    transforms.RandomHorizontalFlip: lambda width, height: [[-1, 0, width], [0, 1, 0], [0, 0, 1]],
    transforms.RandomVerticalFlip: lambda width, height: [[1, 0, 0], [0, -1, height], [0, 0, 1]],
}
GEOMETRIC_OPS = {
    "ShearX": lambda width, height, level: [[1, level, 0], [0, 1, 0], [0, 0, 1]],
    "ShearY": lambda width, height, level: [[1, 0, 0], [level, 1, 0], [0, 0, 1]],
    "TranslateX": lambda width, height, level: [[1, 0, level], [0, 1, 0], [0, 0, 1]],
    "TranslateY": lambda width, height, level: [[1, 0, 0], [0, 1, level], [0, 0, 1]],
    "TranslateXRel": lambda width, height, level: [[1, 0, level * width], [0, 1, 0], [0, 0, 1]],
    "TranslateYRel": lambda width, height, level: [[1, 0, 0], [0, 1, level * height], [0, 0, 1]],
    "Rotate": _rotate,
}
# Steps that do not move pixels, relative to the image's width and height.
STATIONARY = (transforms.ColorJitter, transforms.Resize, transforms.PILToTensor, MaybePILToTensor)


class TokenLabelTransform:
    """A training transform that also records where the pixels come from.

    It draws the same random numbers as `transform` and returns the same images.

    Args:
        transform: a crop (RandomResizedCrop, or RandomCrop with padding), then flips, RandAugment or AutoAugment, and
            color jitter; see `train_transform`.

    Raises:
        UserError: label maps cannot follow one of the steps.
    """

    def __init__(self, transform: transforms.Compose):
        self._transform = copy.deepcopy(transform)
        self._most_frames = 1
        self._observe(self._transform)

    def __call__(self, image: Image.Image, label_map: Tensor, label: int) -> tuple[Tensor, Record]:
        """Transform one sample.

        Args:
            label_map: (2, 5, 18, 18), see `read_label_map`.
            label: the image's class.

        Returns:
            The image, and a record for `dense_targets` of tensors that can be collated: values (5, 18, 18) float32,
            indices (5, 18, 18) int32, crop (4,) (y, x, height, width) as fractions of the image, affines (n, 2, 3)
            from the final image to the crop and to the images in between, label () int64.
        """
        self._crop = (0.0, 0.0, 1.0, 1.0)
        # Matrices from a position (x, y, 1) in the current image to the crop and to the input of each later operation.
        # Pixels from outside any of these images were filled in.
        self._frames = [np.eye(3)]
        image = self._transform(image)
        frames = self._frames + [np.eye(3)] * (self._most_frames - len(self._frames))
        return image, {
            "values": label_map[0].float(),
            "indices": label_map[1].int(),
            "crop": torch.tensor(self._crop),
            "affines": torch.from_numpy(np.stack(frames)[:, :2]).float(),
            "label": torch.tensor(label),
        }

    def _observe(self, step: Callable) -> None:
        """Make a step of the transform report its crop or its geometric operations."""
        if isinstance(step, transforms.Compose):
            for part in step.transforms:
                self._observe(part)
        elif isinstance(step, RandomResizedCropAndInterpolation | transforms.RandomCrop):
            step.get_params = partial(self._cropped, step.get_params, getattr(step, "padding", None) or 0)
        elif type(step) in FLIPS:
            self._most_frames += 1
            step.forward = partial(self._moved, step.forward, FLIPS[type(step)])
        elif isinstance(step, RandAugment | AutoAugment):
            policy = [step.ops] if isinstance(step, RandAugment) else step.policy
            self._most_frames += step.num_layers if isinstance(step, RandAugment) else max(map(len, policy))
            for op in (op for ops in policy for op in ops if op.name in GEOMETRIC_OPS):
                op.aug_fn = partial(self._moved, op.aug_fn, GEOMETRIC_OPS[op.name])
        elif not isinstance(step, STATIONARY):
            raise UserError(
                f"--token-label: label maps cannot follow {type(step).__name__}; do not use --no-aug or --aa augmix"
            )

    def _cropped(self, get_params: Callable, padding: int, image: Image.Image, *ranges: Any) -> tuple:
        top, left, height, width = get_params(image, *ranges)
        rows, columns = image.height - 2 * padding, image.width - 2 * padding
        self._crop = ((top - padding) / rows, (left - padding) / columns, height / rows, width / columns)
        return top, left, height, width

    def _moved(self, operation: Callable, geometry: Callable, image: Image.Image, *level: float, **fill: Any) -> Any:
        moved = operation(image, *level, **fill)
        if moved is not image:
            scale = np.diag([*image.size, 1.0])
            step = np.linalg.inv(scale) @ np.array(geometry(*image.size, *level)) @ scale
            self._frames = [frame @ step for frame in self._frames] + [step]
        return moved


@torch.no_grad()
def dense_targets(
    record: Record, num_classes: int, size: tuple[int, int], smoothing: float = 0.1, swapped: bool = False
) -> Tensor:
    """The training targets of a batch, on the record's device.

    RoIAlign averages the teacher's logits over the region that each token sees, and a softmax over the classes follows.
    Classes that the teacher did not name, and pixels that the augmentation filled in, have logits of zero. A token that
    only sees such pixels gets the uniform distribution.

    With smoothing s and C classes, the target is p·(1 − s + s/C) + s/C for a probability p of the softmax, as in the
    reference implementation. A smoothed token target therefore sums to 1 + s/C. The ground truth sums to 1.

    Args:
        record: collated records of `TokenLabelTransform`.
        size: (height, width) of the last stage in tokens.
        swapped: exchange x and y in RoIAlign's box, as the reference implementation does. Unless the crop lies on the
            diagonal, the labels are then those of another region. Only for exact reproduction.

    Returns:
        (B, classes, 1 + 1 + h·w): ground truth, class token, tokens row by row. For size (1, 1), whose only token has
        the region of the class token, (B, classes, 2).
    """
    grids = list(dict.fromkeys([(1, 1), size]))
    with torch.autocast(record["values"].device.type, enabled=False):
        logits = region_logits(record, num_classes, grids, swapped)
        off = smoothing / num_classes
        on = 1 - smoothing + off
        labels = torch.nn.functional.one_hot(record["label"], num_classes)
        ground_truth = torch.where(labels.bool(), on, off).unsqueeze(2)
        return torch.cat([ground_truth, logits.softmax(1) * on + off], dim=2)


def region_logits(record: Record, num_classes: int, grids: Sequence[tuple[int, int]], swapped: bool = False) -> Tensor:
    """The mean logits in each region of one or several (h, w) grids over each augmented image.

    Returns:
        (B, classes, sum of the grids' h·w).
    """
    values, indices = record["values"].flatten(2), record["indices"].long().flatten(2)
    dense = values.new_zeros(len(values), num_classes, MAP_SIZE**2).scatter_(1, indices, values)
    weights = [_region_weights(record["crop"], record["affines"], grid, swapped) for grid in grids]
    return dense @ torch.cat(weights, dim=1).mT


def _region_weights(crop: Tensor, affines: Tensor, grid: tuple[int, int], swapped: bool) -> Tensor:
    """The weight of each cell of the label map in each region, (B, h·w, 18·18).

    RoIAlign (He et al. 2017; ``aligned=False``, adaptive number of samples) averages bilinear samples on a regular
    grid. torchvision's only accepts upright boxes, so the affine maps are applied to its samples here. The results are
    torchvision's for upright boxes inside the image.

    Args:
        crop: (B, 4) y, x, height, width as fractions.
        affines: (B, n, 2, 3).
    """
    top_left, extent = crop[:, [0, 1, 2, 3] if swapped else [1, 0, 3, 2]].chunk(2, dim=1)  # (B, 2): x, y
    start = top_left * MAP_SIZE - 0.5
    extent = ((top_left + extent) * MAP_SIZE - 0.5 - start).clamp(min=1)  # rounded like torchvision's boxes
    x, weight_x = _sample_positions(extent[:, 0], grid[1])
    y, weight_y = _sample_positions(extent[:, 1], grid[0])

    # Positions in the final image (B, h, w, samples along y, samples along x, 3), in earlier images and in the map.
    x, y = torch.broadcast_tensors(x[:, None, :, None, :], y[:, :, None, :, None])
    weight = weight_x[:, None, :, None, :] * weight_y[:, :, None, :, None]
    positions = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    in_frames = torch.einsum("bnij,bhwklj->nbhwkli", affines, positions)
    shape = (-1, 1, 1, 1, 1, 2)
    in_map = in_frames[0] * extent.view(shape) + start.view(shape)
    margin = 1e-4  # of a map cell; rounding must not put a sample outside
    inside = ((in_frames >= -margin) & (in_frames <= 1 + margin)).all(dim=0)
    inside = (inside & (in_map >= -0.5 - margin) & (in_map <= MAP_SIZE - 0.5 + margin)).all(dim=-1)

    # Bilinear weights of the 18 columns and 18 rows; the value is constant in the outermost half of a cell.
    cells = torch.arange(MAP_SIZE, device=crop.device)
    hats = (1 - (in_map.clamp(0, MAP_SIZE - 1).unsqueeze(-1) - cells).abs()).clamp(min=0)
    weights = torch.einsum("bhwkl,bhwklr,bhwklc->bhwrc", weight * inside, hats[..., 1, :], hats[..., 0, :])
    return weights.flatten(3).flatten(1, 2)


def _sample_positions(extent: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """RoIAlign's samples along one axis: the number of map cells per bin, rounded up.

    Args:
        extent: (B,) of the crop, in map cells.

    Returns:
        Positions in [0, 1] and their weights, both (B, bins, samples). Unused samples have weight 0.
    """
    count = torch.ceil(extent / bins)[:, None, None]
    sample = torch.arange(math.ceil(MAP_SIZE / bins), device=extent.device)
    bin_number = torch.arange(bins, device=extent.device)[:, None]
    positions = (bin_number + (sample + 0.5) / count) / bins
    return positions, ((sample < count) / count).expand_as(positions)
