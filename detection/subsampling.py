"""Which anchors and proposals a training step looks at, drawn for each image by itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class KeyedSubsampler:
    """What torchvision draws from the global generator for a batch, drawn for each image by the image's own seed.

    So an image's part of a step is the same in any batch, on any process.

    Attributes:
        seeds: of the images of the next batch, to be set before each.
        drawn: how many the last batch had, of them `positives` on objects.
    """

    def __init__(self, like: BalancedPositiveNegativeSampler):
        """like: torchvision's, which says how many to draw an image, and what part of them on objects."""
        self._number = like.batch_size_per_image
        self._most_positives = int(like.batch_size_per_image * like.positive_fraction)
        self.seeds: Sequence[int] = ()
        self.drawn = self.positives = 0

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the positives and the negatives drawn, for labels above 0 and equal to 0 of each image."""
        self.drawn = self.positives = 0
        positive_masks, negative_masks = [], []
        for own, seed in zip(labels, self.seeds, strict=True):
            generator = torch.Generator().manual_seed(seed)
            positives = _draw(own >= 1, self._most_positives, generator)
            negatives = _draw(own == 0, self._number - len(positives), generator)
            positive_masks.append(_mask(own, positives))
            negative_masks.append(_mask(own, negatives))
            self.positives += len(positives)
            self.drawn += len(positives) + len(negatives)
        return positive_masks, negative_masks


def _draw(candidates: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """At most so many indices at which `candidates` is true."""
    indices = candidates.nonzero()[:, 0]
    chosen = torch.randperm(len(indices), generator=generator)[:most]  # on the CPU: the same on every device
    return indices[chosen.to(indices.device)]


def _mask(like: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.uint8).index_fill_(0, indices, 1)
