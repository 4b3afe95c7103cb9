"""What an image goes through before the model: timm's transforms, as DeiT sets them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torchvision import transforms

from inputs.resize import BoundedResize, ResizedCentre
from utils import UserError

SMALL_INPUT = 32  # up to this size DeiT crops with padding instead of rescaling
MAX_SIDE = 9999


def image_size(size: int | str | Sequence[int]) -> tuple[int, int]:
    """(height, width) in pixels from one number, two, or text: 224, (192, 256), "224", "192x256".

    The one parser of pixels: of flags, configurations and checkpoints.

    Raises:
        UserError: it is nothing of that, or a side is not from 1 to 9999.
    """
    if isinstance(size, str):
        sides = [
            int(side) if side.isascii() and side.isdigit() and len(side) <= 4 else side
            for side in size.lower().split("x")
        ]
    else:
        sides = list(size) if isinstance(size, (list, tuple)) else [size]
    if len(sides) not in (1, 2) or not all(type(side) is int and 0 < side <= MAX_SIDE for side in sides):
        raise UserError(f"{size!r:.60} is no image size: pixels (224) or HEIGHTxWIDTH (192x256)")
    return sides[0], sides[-1]


def _posterize(image: Image.Image, bits: int, **fill: Any) -> Image.Image:
    """RandAugment's strongest posterize keeps no bits: a black image. Pillow 13 refuses to make it."""
    return Image.new(image.mode, image.size) if bits == 0 else auto_augment.posterize(image, bits, **fill)


auto_augment.NAME_TO_OP |= dict.fromkeys([name for name in auto_augment.NAME_TO_OP if "Posterize" in name], _posterize)


def build_transform(
    train: bool,
    input_size: int | Sequence[int],
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    scale: Sequence[float] = (0.08, 1.0),
    color_jitter: float | None = 0.4,
    aa: str | None = None,
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    glyphs: bool = False,
    normalize: bool = True,
) -> transforms.Compose:
    """Timm's transform from an RGB image to a tensor (3, H, W), as DeiT sets it up.

    Training: RandomResizedCrop, flip, RandAugment or colour jitter, erasing; up to 32 pixels, and for glyphs,
    a crop with padding in the place of the first. Evaluation: resize the shorter side to size / crop_pct,
    then crop the centre.

    Args:
        input_size: one side, or height and width.
        crop_pct: evaluation only; see `evaluation_crop`.
        scale: training only; the part of the image's area that RandomResizedCrop takes.
        color_jitter: its strength; RandAugment takes its place.
        aa: an augmentation policy of timm's; None or "" for none.
        glyphs: images whose class changes when they are mirrored: no flip, and a gentle crop.
        normalize: give float, normalised with mean and std; else uint8. Erasing fills with noise in
            normalised units and needs the former.
    """
    size = image_size(input_size)
    if not train:
        transform = create_transform(
            size, interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, normalize=normalize
        )
        resize, crop, *rest = transform.transforms
        return transforms.Compose([ResizedCentre(resize, crop), *rest])
    transform = create_transform(
        size,
        is_training=True,
        scale=tuple(scale),
        color_jitter=color_jitter,
        auto_augment=aa or None,
        interpolation=interpolation,
        mean=mean,
        std=std,
        hflip=0.0 if glyphs else 0.5,
        re_prob=reprob,
        re_mode=remode,
        re_count=recount,
        normalize=normalize,
    )
    if glyphs or max(size) <= SMALL_INPUT:
        resample = "bicubic" if interpolation == "random" else interpolation
        transform.transforms[0] = transforms.Compose(
            [
                BoundedResize(max(size), transforms.InterpolationMode(resample)),
                transforms.RandomCrop(size, padding=max(1, min(size) // 8)),
            ]
        )
    return transform


def evaluation_crop(glyphs: bool, input_size: int | Sequence[int], crop_pct: float) -> float:
    """What evaluation crops: small inputs and glyphs are seen whole, the rest as --eval-crop-pct says."""
    return 1.0 if glyphs or max(image_size(input_size)) <= SMALL_INPUT else crop_pct
