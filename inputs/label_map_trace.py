"""What the augmentation of an image did to its places, so that a label map can follow.

`TokenLabelTransform` records it as a crop box and affine maps; `label_map_crop` applies them to a batch of maps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from utils import UserError

Record = dict[str, Tensor]  # see `TokenLabelTransform.__call__`


class Trace:
    """Where the pixels of an augmented image come from, in fractions of width and height.

    crop: (y, x, height, width) of the crop in the source image.
    frames: 3×3 each, take (x, y, 1) in the image as it is now to (x, y, 1) in an earlier one: the crop as it
        was cut out, then every image that a geometric operation was applied to. What lies outside any of
        them was filled in.
    """

    def __init__(self) -> None:
        self.crop = (0.0, 0.0, 1.0, 1.0)
        self.frames = [np.eye(3)]

    def move(self, matrix: Sequence[Sequence[float]], size: tuple[int, int], fills: bool = True) -> None:
        """Add an operation that takes pixel p from matrix·p in an image of size (width, height).

        fills: whether parts of that image may fall out of sight, and others be filled in.
        """
        scale = np.diag([*size, 1.0])
        step = np.linalg.inv(scale) @ np.array(matrix, dtype=np.float64) @ scale
        self.frames = [frame @ step for frame in self.frames] + ([step] if fills else [])

    def affines(self, count: int) -> Tensor:
        """The frames, and the identity in the place of those that were not needed, (count, 2, 3)."""
        padded = self.frames + [np.eye(3)] * (count - len(self.frames))
        return torch.from_numpy(np.stack(padded)[:, :2]).float()


# What the geometric operations of timm.data.auto_augment fill place (x, y, 1) from, given their level and the
# image's width and height. The origin is the corner of the first pixel, not its centre.


def _shear_x(level: float, width: int, height: int) -> list[list[float]]:
    return [[1, level, 0], [0, 1, 0], [0, 0, 1]]


def _shear_y(level: float, width: int, height: int) -> list[list[float]]:
    return [[1, 0, 0], [level, 1, 0], [0, 0, 1]]


def _translate(x: float, y: float) -> list[list[float]]:
    return [[1, 0, x], [0, 1, y], [0, 0, 1]]


def _rotate(degrees: float, width: int, height: int) -> list[list[float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]]


GEOMETRIC_OPS: dict[str, Callable[[float, int, int], list[list[float]]]] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": lambda level, width, height: _translate(level, 0),
    "TranslateY": lambda level, width, height: _translate(0, level),
    "TranslateXRel": lambda level, width, height: _translate(level * width, 0),
    "TranslateYRel": lambda level, width, height: _translate(0, level * height),
    "Rotate": _rotate,
}
# These leave every place of the image where it is, in fractions of width and height.
STATIONARY = (
    transforms.ColorJitter,
    transforms.RandomGrayscale,
    transforms.GaussianBlur,
    transforms.Resize,
    transforms.Normalize,
    transforms.ToTensor,
    transforms.PILToTensor,
    MaybePILToTensor,
    RandomErasing,
)
Step = Callable[[Any, Trace], Any]


class TokenLabelTransform:
    """A training transform that also says what to do with the label map.

    The image is what `transform` gives, by the same draws from the global random generators.

    Args:
        transform: timm's training transform (`timm.data.create_transform`) for RGB images: a crop first
            (RandomResizedCrop, or RandomCrop with padding), then flips, RandAugment or AutoAugment, and
            changes of colour; with pixels or normalised floats as output.

    Raises:
        UserError: AugMix, which shows several warped copies of the image at once.
        ValueError: a step of which it is not known what it moves.
    """

    def __init__(self, transform: transforms.Compose):
        steps = _flat(transform)
        self._steps = [_traced_step(step) for step in steps]
        self._frames = 1 + sum(_operations(step) for step in steps)

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
        trace = Trace()
        for step in self._steps:
            image = step(image, trace)
        return image, {
            "values": label_map[0].float(),
            "indices": label_map[1].int(),
            "crop": torch.tensor(trace.crop),
            "affines": trace.affines(self._frames),
            "label": torch.tensor(label),
        }


def _flat(transform: transforms.Compose) -> list[Callable]:
    """The steps of nested compositions in order."""
    return [
        part
        for step in transform.transforms
        for part in (_flat(step) if isinstance(step, transforms.Compose) else [step])
    ]


def _operations(step: Callable) -> int:
    """How many operations a step applies at most."""
    if isinstance(step, RandAugment):
        return step.num_layers
    return max(map(len, step.policy)) if isinstance(step, AutoAugment) else 0


def _traced_step(step: Callable) -> Step:
    for kind, traced in TRACED_STEPS:
        if isinstance(step, kind):
            return partial(traced, step)
    if isinstance(step, AugMixAugment):
        raise UserError("--aa augmix shows several warped copies of an image at once: not with token labels")
    raise ValueError(f"token labels: not known where {type(step).__name__} moves pixels")


def _stationary(step: Callable, image: Any, trace: Trace) -> Any:
    return step(image)


def _resized_crop(step: RandomResizedCropAndInterpolation, image: Image.Image, trace: Trace) -> Image.Image:
    recorded = copy.copy(step)
    recorded.get_params = partial(_recorded_crop, step.get_params, trace)
    return recorded(image)


def _recorded_crop(get_params: Callable, trace: Trace, image: Image.Image, *ranges: Sequence[float]) -> tuple:
    top, left, height, width = get_params(image, *ranges)
    trace.crop = (top / image.height, left / image.width, height / image.height, width / image.width)
    return top, left, height, width


def _padded_crop(step: transforms.RandomCrop, image: Image.Image, trace: Trace) -> Image.Image:
    margin = step.padding or 0
    if not isinstance(margin, int) or step.pad_if_needed:
        raise ValueError("token labels: RandomCrop pads by one number or not at all")
    padded = functional.pad(image, margin, step.fill, step.padding_mode)
    top, left, height, width = step.get_params(padded, step.size)
    trace.crop = (
        (top - margin) / image.height,
        (left - margin) / image.width,
        height / image.height,
        width / image.width,
    )
    return functional.crop(padded, top, left, height, width)


def _horizontal_flip(step: transforms.RandomHorizontalFlip, image: Image.Image, trace: Trace) -> Image.Image:
    if torch.rand(1) >= step.p:
        return image
    trace.move([[-1, 0, image.width], [0, 1, 0], [0, 0, 1]], image.size, fills=False)
    return functional.hflip(image)


def _vertical_flip(step: transforms.RandomVerticalFlip, image: Image.Image, trace: Trace) -> Image.Image:
    if torch.rand(1) >= step.p:
        return image
    trace.move([[1, 0, 0], [0, -1, image.height], [0, 0, 1]], image.size, fills=False)
    return functional.vflip(image)


def _rand_augment(step: RandAugment, image: Image.Image, trace: Trace) -> Image.Image:
    traced = copy.copy(step)
    traced.ops = [_traced_op(op, trace) for op in step.ops]
    return traced(image)


def _auto_augment(step: AutoAugment, image: Image.Image, trace: Trace) -> Image.Image:
    traced = copy.copy(step)
    traced.policy = [[_traced_op(op, trace) for op in sub_policy] for sub_policy in step.policy]
    return traced(image)


def _traced_op(op: AugmentOp, trace: Trace) -> AugmentOp:
    """`op`, which draws its level itself, reporting what it does with it."""
    if op.name not in GEOMETRIC_OPS:
        return op
    traced = copy.copy(op)
    traced.aug_fn = partial(_recorded_op, op, trace)
    return traced


def _recorded_op(
    op: AugmentOp, trace: Trace, image: Image.Image, level: float, *, fillcolor: Any, resample: Any
) -> Image.Image:
    trace.move(GEOMETRIC_OPS[op.name](level, *image.size), image.size)
    return op.aug_fn(image, level, fillcolor=fillcolor, resample=resample)


TRACED_STEPS: tuple[tuple[type | tuple[type, ...], Callable], ...] = (
    (RandomResizedCropAndInterpolation, _resized_crop),
    (transforms.RandomCrop, _padded_crop),
    (transforms.RandomHorizontalFlip, _horizontal_flip),
    (transforms.RandomVerticalFlip, _vertical_flip),
    (RandAugment, _rand_augment),
    (AutoAugment, _auto_augment),
    (STATIONARY, _stationary),
)
