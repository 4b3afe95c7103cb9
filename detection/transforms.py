"""Augmentation of images and their objects with `torchvision.transforms.v2`."""

import argparse

from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

JITTER = (0.1, 2.0)  # Ghiasi et al. 2021, "Simple Copy-Paste"


class TrainTransform:
    """Augments an image and its objects to a detector's training input: the image, uint8 (3, H, W), and its target.

    The target contains "boxes" float32 (N, 4), "labels" int64 (N,), and for Mask R-CNN "masks" uint8 (N, H, W).
    All randomness comes from the global generators.
    """

    def __init__(self, args: argparse.Namespace):
        size = args.large_scale_jitter
        self._crops = size > 0
        if self._crops:
            scale = [v2.ScaleJitter((size, size), JITTER), v2.RandomCrop((size, size), pad_if_needed=True)]
        else:
            scale = [v2.RandomShortestSize(list(args.min_size), args.max_size)]
        flips = [v2.RandomHorizontalFlip(args.hflip), v2.RandomVerticalFlip(args.vflip)]
        self._transform = v2.Compose([*scale, *flips, v2.SanitizeBoundingBoxes(min_size=1), v2.ToPureTensor()])

    def __call__(self, image: Image.Image, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, target = self._transform(tv_tensors.Image(v2.functional.pil_to_tensor(image)), target)
        if self._crops and "masks" in target:
            target = fit_boxes(target)
        return pixels, target


def fit_boxes(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fit the boxes to the cropped masks, and remove objects that were cropped away."""
    left = target["masks"].bool().flatten(1).any(1)
    target = {name: value[left] for name, value in target.items()}
    boxes = masks_to_boxes(target["masks"])
    boxes[:, 2:] += 1  # from the last pixel to its far edge
    return target | {"boxes": boxes}
