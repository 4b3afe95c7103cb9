"""Classification's samples: images with one label each, or with a label map."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from inputs.image_sets import ImageDataset
from inputs.images import BadImage
from inputs.label_map_trace import Record
from inputs.label_maps import image_map_path, read_label_map
from inputs.resize import Elongated
from inputs.samples import KeyedSamples
from inputs.settings import LoaderSettings


class Batch(NamedTuple):
    """A batch on the device.

    images: (B, 3, H, W) float32, normalised. targets: int64 (B,), or the collated records of token labels.
    indices: int64 (B,) on the CPU, for ``dataset.path``.
    """

    images: Tensor
    targets: Tensor | Record
    indices: Tensor


class KeyedImages(KeyedSamples):
    """Decoded and transformed images by key: (image, label), or (image, record) with label maps."""

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable,
        seed: int,
        skip_bad_images: bool = False,
        label_maps: str | None = None,
    ):
        """label_maps: the folder of token-label maps; `transform` is then a `TokenLabelTransform`."""
        super().__init__(dataset, seed, skip_bad_images)
        self._transform = transform
        self._label_maps = label_maps

    def read(self, index: int) -> tuple[Tensor, int | Record]:
        image, label = self.dataset.load(index)
        try:
            if self._label_maps is None:
                return self._transform(image), label
            path = image_map_path(self._label_maps, self.dataset.path(index))
            return self._transform(image, read_label_map(path, len(self.dataset.class_names)), label)
        except Elongated as error:
            raise BadImage(f"{self.dataset.path(index)}: {error}") from error

    def placement(self, settings: LoaderSettings) -> Callable[[list, Tensor], Batch]:
        """Moves images and targets; bytes are normalised there, what is normalised already stays."""
        device = settings.dist.device
        # On the scale of uint8, so that the division by 255 is not needed.
        mean, std = (
            torch.tensor(values, device=device).mul_(255).view(1, -1, 1, 1) for values in (settings.mean, settings.std)
        )

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        def place(content: list, indices: Tensor) -> Batch:
            images, targets = content
            images = move(images)
            if images.dtype == torch.uint8:
                images = images.float().sub_(mean).div_(std)
            if isinstance(targets, dict):
                return Batch(images, {name: move(value) for name, value in targets.items()}, indices)
            return Batch(images, move(targets), indices)

        return place
