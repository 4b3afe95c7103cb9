"""The order of the samples, computed so that it is the same for any number of workers and processes.

A task with special batches (such as images grouped by aspect ratio) overrides `KeyedSampler.order`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils import UserError, key_seed

REPEAT_ROUND = 256  # an epoch of repeated augmentation has a multiple of this many samples


class SampleKey(NamedTuple):
    """Identifies a sample of an epoch. With the seed, it is the key of all random choices about the sample."""

    epoch: int
    index: int
    repeat: int


@dataclass(frozen=True)
class KeyedSampler:
    """The order of training samples.

    The order of an epoch is a permutation keyed on (seed, epoch). Micro-step s takes the s-th group of
    G = batch_size · world_size samples; a rank takes every world_size-th sample of it. The remainder of less
    than accum_iter · G samples is not used in that epoch.

    With repeats > 1 it is DeiT's RASampler (Hoffer et al. 2020, "Augment your batch"; Berman et al. 2019):
    each sample occurs `repeats` times in a row, on different ranks and with different keys. The epoch still has
    as many samples as the data set, rounded down to a multiple of 256 (unless there are fewer than 256).

    Args:
        size: samples in the data set.
        batch_size: samples per rank and micro-step.
        accum_iter: micro-steps per update; an epoch has complete updates only.
        probabilities: draw samples with replacement, each with its probability, instead of permuting them.

    Raises:
        UserError: the data set is smaller than one update.
    """

    size: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accum_iter: int = 1
    repeats: int = 1
    probabilities: np.ndarray | None = None

    def __post_init__(self) -> None:
        if len(self) == 0:
            raise UserError(
                f"an update takes {self.batch_size * self.world_size * self.accum_iter} images (--batch-size "
                f"{self.batch_size} x {self.world_size} processes x --accum-iter {self.accum_iter}) and the training "
                f"set has {self.size}: lower --batch-size"
            )

    def __len__(self) -> int:
        """Micro-steps per epoch."""
        rounded = self.repeats > 1 and self.size >= REPEAT_ROUND
        samples = self.size // REPEAT_ROUND * REPEAT_ROUND if rounded else self.size
        return samples // (self.batch_size * self.world_size * self.accum_iter) * self.accum_iter

    def order(self, epoch: int) -> np.ndarray:
        """The samples of an epoch: a permutation, or as many samples drawn with `probabilities`."""
        key = key_seed(self.seed, "order", epoch)
        # RandomState guarantees its streams; those of newer numpy and torch generators may change.
        generator = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
        if self.probabilities is None:
            return generator.permutation(self.size)
        return generator.choice(self.size, self.size, p=self.probabilities)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[SampleKey]]:
        """Yield this rank's batches of an epoch, from micro-step `start_step`."""
        order = self.order(epoch)
        piece = self.batch_size * self.world_size
        for step in range(start_step, len(self)):
            positions = range(step * piece + self.rank, (step + 1) * piece, self.world_size)
            yield [SampleKey(epoch, int(order[p // self.repeats]), p % self.repeats) for p in positions]
