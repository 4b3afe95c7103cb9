"""Token labels of augmented images: label maps that follow the crop, the flips and RandAugment's geometry.

`TokenLabelTransform` records in a worker where an augmented image comes from, as a crop box and affine maps.
`dense_targets` applies them to the label maps of a whole batch, on its device.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugMixAugment, AutoAugment, RandAugment
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms

from inputs.label_maps import MAP_SIZE
from utils import UserError

Record = dict[str, Tensor]  # see `TokenLabelTransform.__call__`
Matrix = Sequence[Sequence[float]]


def _rotate(degrees: float, width: int, height: int) -> Matrix:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]]


# Where the geometric operations of timm.data.auto_augment take pixel (x, y, 1) from, given their level and the
# image's width and height. The origin is the corner of the first pixel, not its centre.
GEOMETRIC_OPS: dict[str, Callable[[float, int, int], Matrix]] = {
    "ShearX": lambda level, width, height: [[1, level, 0], [0, 1, 0], [0, 0, 1]],
    "ShearY": lambda level, width, height: [[1, 0, 0], [level, 1, 0], [0, 0, 1]],
    "TranslateX": lambda level, width, height: [[1, 0, level], [0, 1, 0], [0, 0, 1]],
    "TranslateY": lambda level, width, height: [[1, 0, 0], [0, 1, level], [0, 0, 1]],
    "TranslateXRel": lambda level, width, height: [[1, 0, level * width], [0, 1, 0], [0, 0, 1]],
    "TranslateYRel": lambda level, width, height: [[1, 0, 0], [0, 1, level * height], [0, 0, 1]],
    "Rotate": _rotate,
}
FLIPS = {
    transforms.RandomHorizontalFlip: [[-1, 0, 1], [0, 1, 0], [0, 0, 1]],
    transforms.RandomVerticalFlip: [[1, 0, 0], [0, -1, 1], [0, 0, 1]],
}
# These leave every pixel where it is, in fractions of width and height.
STATIONARY = (
    transforms.ColorJitter,
    transforms.RandomGrayscale,
    transforms.GaussianBlur,
    transforms.Resize,
    transforms.PILToTensor,
    MaybePILToTensor,
)


class TokenLabelTransform:
    """A training transform that also records where the pixels come from.

    The image is the one that `transform` gives, by the same draws from the global random generators.

    Args:
        transform: timm's training transform (`timm.data.create_transform`) for images: a crop first
            (RandomResizedCrop, or RandomCrop with padding), then flips, RandAugment or AutoAugment, and
            changes of colour.

    Raises:
        UserError: AugMix, which blends several warped copies of the image.
        ValueError: a step whose geometry is unknown.
    """

    def __init__(self, transform: transforms.Compose):
        self._transform = copy.deepcopy(transform)
        self._count = 1  # of frames at most
        self._observe(self._transform)

    def __call__(self, image: Image.Image, label_map: Tensor, label: int) -> tuple[Tensor, Record]:
        """Transform one sample.

        Args:
            label_map: (2, 5, 18, 18), see `read_label_map`.
            label: the image's class.

        Returns:
            The image, and a record for `dense_targets`, whose tensors collate: values (5, 18, 18) float32,
            indices (5, 18, 18) int32, crop (4,) (y, x, height, width) as fractions of the image, affines
            (n, 2, 3), from the final image to the crop and to the images in between, label () int64.
        """
        self._crop = (0.0, 0.0, 1.0, 1.0)
        # 3×3 each, from (x, y, 1) in the image as it is now to (x, y, 1) in an earlier one: the crop as it was cut
        # out, then every image that a geometric operation was applied to. What lies outside any of them was filled in.
        self._frames = [np.eye(3)]
        image = self._transform(image)
        frames = self._frames + [np.eye(3)] * (self._count - len(self._frames))
        return image, {
            "values": label_map[0].float(),
            "indices": label_map[1].int(),
            "crop": torch.tensor(self._crop),
            "affines": torch.from_numpy(np.stack(frames)[:, :2]).float(),
            "label": torch.tensor(label),
        }

    def _observe(self, step: Callable) -> None:
        """Make a step of the transform report what it does with the image."""
        if isinstance(step, transforms.Compose):
            for part in step.transforms:
                self._observe(part)
        elif isinstance(step, RandomResizedCropAndInterpolation):
            step.get_params = partial(self._cropped, step.get_params, 0)
        elif isinstance(step, transforms.RandomCrop) and isinstance(step.padding or 0, int) and not step.pad_if_needed:
            step.get_params = partial(self._cropped, step.get_params, step.padding or 0)
        elif type(step) in FLIPS:
            step.forward = partial(self._flipped, step.forward, FLIPS[type(step)])
        elif isinstance(step, RandAugment | AutoAugment):
            policy = [step.ops] if isinstance(step, RandAugment) else step.policy
            self._count += step.num_layers if isinstance(step, RandAugment) else max(map(len, policy))
            for op in (op for ops in policy for op in ops if op.name in GEOMETRIC_OPS):
                op.aug_fn = partial(self._moved, op.aug_fn, GEOMETRIC_OPS[op.name])
        elif isinstance(step, AugMixAugment):
            raise UserError("--aa augmix blends several warped copies of an image: it excludes token labels")
        elif not isinstance(step, STATIONARY):
            raise ValueError(f"token labels: the geometry of {type(step).__name__} is unknown")

    def _cropped(self, get_params: Callable, padding: int, image: Image.Image, *ranges: Any) -> tuple:
        top, left, height, width = get_params(image, *ranges)
        rows, columns = image.height - 2 * padding, image.width - 2 * padding
        self._crop = ((top - padding) / rows, (left - padding) / columns, height / rows, width / columns)
        return top, left, height, width

    def _flipped(self, flip: Callable, matrix: Matrix, image: Image.Image) -> Image.Image:
        flipped = flip(image)
        if flipped is not image:
            self._frames = [frame @ np.array(matrix) for frame in self._frames]
        return flipped

    def _moved(self, operation: Callable, geometry: Callable, image: Image.Image, level: float, **fill: Any) -> Any:
        scale = np.diag([*image.size, 1.0])
        step = np.linalg.inv(scale) @ np.array(geometry(level, *image.size)) @ scale
        self._frames = [frame @ step for frame in self._frames] + [step]
        return operation(image, level, **fill)


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
        swapped: pass RoIAlign its box with x and y exchanged, as the reference does (another region's labels
            for every crop off the diagonal); for exact reproduction only.

    Returns:
        (B, classes, 1 + 1 + h·w): ground truth, class token, tokens row by row. With size 1, whose one token
        is the class token's region, (B, classes, 2).
    """
    height, width = (size, size) if isinstance(size, int) else size
    grids = [(1, 1)] if (height, width) == (1, 1) else [(1, 1), (height, width)]
    with torch.autocast(record["values"].device.type, enabled=False):
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
    dense = values.new_zeros(len(values), num_classes, MAP_SIZE**2).scatter_(1, indices, values)
    weights = [_region_weights(record["crop"], record["affines"], grid, swapped) for grid in grids]
    return dense @ torch.cat(weights, dim=1).mT


def _region_weights(crop: Tensor, affines: Tensor, grid: tuple[int, int], swapped: bool) -> Tensor:
    """The weight of each place of a map in each region, (B, h·w, 18·18).

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
