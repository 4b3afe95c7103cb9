"""The anchors and proposals that a training step uses, sampled for each image on its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler


class KeyedSubsampler:
    """torchvision's sampler of anchors or proposals, with a seed for each image instead of the global generator.

    An image's contribution to a step is then the same in any batch and on any process.

    Attributes:
        seeds: those of the next batch's images, to be set before each batch.
        drawn, positives: the number of samples of the last batch, and of those on objects.
    """

    def __init__(self, like: BalancedPositiveNegativeSampler):
        """like: torchvision's sampler, for the number of samples per image and the fraction on objects."""
        self._number = like.batch_size_per_image
        self._most_positives = int(like.batch_size_per_image * like.positive_fraction)
        self.seeds: Sequence[int] = ()
        self.drawn = self.positives = 0

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the sampled positives (labels above 0) and negatives (labels equal to 0) of each image."""
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
    """Up to `most` random indices at which `candidates` is true."""
    indices = candidates.nonzero()[:, 0]
    chosen = torch.randperm(len(indices), generator=generator)[:most]  # on the CPU: the same on every device
    return indices[chosen.to(indices.device)]


def _mask(like: Tensor, indices: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.uint8).index_fill_(0, indices, 1)
