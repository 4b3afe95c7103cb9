"""Transforms from a decoded image to the model's input: timm's with DeiT's settings, and random erasing."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment, create_transform
from torch import Tensor
from torchvision import transforms

from models.resampling import to_grid

SMALL_INPUT = 32  # up to this size, DeiT uses a padded crop instead of a resized crop


def _posterize(image: Image.Image, bits: int, **fill: Any) -> Image.Image:
    """RandAugment's strongest posterize keeps 0 bits, which gives a black image. Pillow 13 raises an error instead."""
    return Image.new(image.mode, image.size) if bits == 0 else auto_augment.posterize(image, bits, **fill)


auto_augment.NAME_TO_OP |= dict.fromkeys([name for name in auto_augment.NAME_TO_OP if "Posterize" in name], _posterize)


def train_transform(
    input_size: int | Sequence[int],
    *,
    glyphs: bool = False,
    no_aug: bool = False,
    aa: str | None = None,
    hflip: float | None = None,
    interpolation: str = "bicubic",
    **options: Any,
) -> transforms.Compose:
    """The training transform from a PIL image to a uint8 tensor (C, H, W): timm's with DeiT's settings.

    RandomResizedCrop, flip, RandAugment or colour jitter. Up to 32 pixels, and for glyphs, a crop with padding
    replaces RandomResizedCrop.

    Args:
        input_size: one side, or height and width.
        glyphs: flips and strong crops may change the class of an image.
        no_aug: only resize and centre-crop.
        aa: the name of one of timm's augmentation policies; None or "" for none.
        hflip: the probability of a horizontal flip; None for 0.5, or 0 for glyphs.
        options: mean, scale, ratio, vflip and color_jitter of `timm.data.create_transform`.
    """
    size = to_grid(input_size)
    hflip = (0.0 if glyphs else 0.5) if hflip is None else hflip
    options |= {"auto_augment": aa or None, "hflip": hflip, "interpolation": interpolation, "normalize": False}
    transform = create_transform(size, is_training=True, no_aug=no_aug, **options)
    if (glyphs or max(size) <= SMALL_INPUT) and not no_aug:
        resample = transforms.InterpolationMode("bicubic" if interpolation == "random" else interpolation)
        crop = transforms.RandomCrop(size, padding=max(1, min(size) // 8))
        transform.transforms[0] = transforms.Compose([transforms.Resize(max(size), resample), crop])
    return transform


def eval_transform(
    input_size: int | Sequence[int], *, crop_pct: float = 0.875, interpolation: str = "bicubic"
) -> transforms.Compose:
    """The evaluation transform from a PIL image to a uint8 tensor (C, H, W): timm's.

    The shorter side is resized to size / crop_pct, then the centre is cropped.
    """
    return create_transform(to_grid(input_size), interpolation=interpolation, crop_pct=crop_pct, normalize=False)


@dataclass(frozen=True)
class RandomErasing:
    """Random erasing (Zhong et al. 2020), with the distribution of `timm.data.random_erasing.RandomErasing`.

    In a worker, `draw` chooses boxes and a seed for the noise from Python's random generator. On the device, `erase`
    fills the boxes, so that workers can return uint8 images.

    Args:
        probability: the probability that anything in an image is erased.
        mode: the content of the boxes after normalisation: "const" (zeros), "rand" (a normal random value for each box
            and channel) or "pixel" (a normal random value for each pixel and channel).
        count: number of boxes per image.
    """

    probability: float
    mode: str = "pixel"
    count: int = 1
    area = (0.02, 1 / 3)  # of the image, all boxes together
    log_aspect = (math.log(0.3), math.log(1 / 0.3))

    def draw(self, height: int, width: int) -> Tensor:
        """(count, 5) int64: top, left, height, width and seed of each box; zeros where none is erased."""
        boxes = torch.zeros(self.count, 5, dtype=torch.int64)
        if random.random() > self.probability:
            return boxes
        for box in range(self.count):
            for _ in range(10):
                area = random.uniform(*self.area) * height * width / self.count
                aspect = math.exp(random.uniform(*self.log_aspect))
                high, wide = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if high < height and wide < width:
                    top, left = random.randint(0, height - high), random.randint(0, width - wide)
                    boxes[box] = torch.tensor([top, left, high, wide, random.getrandbits(62)])
                    break
        return boxes

    def erase(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Fill boxes (B, count, 5), on the CPU, of normalised images (B, C, H, W) in place."""
        generator = torch.Generator(images.device)
        for image, own in zip(images, boxes.tolist(), strict=True):
            for top, left, height, width, seed in own:
                if height and width:
                    box = image[:, top : top + height, left : left + width]
                    shape = box.shape if self.mode == "pixel" else (len(image), 1, 1)
                    noise = torch.randn(shape, generator=generator.manual_seed(seed), device=images.device)
                    box.copy_(torch.zeros_like(box) if self.mode == "const" else noise)
        return images
