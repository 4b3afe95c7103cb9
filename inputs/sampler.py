"""The order of the samples, by arithmetic alone: the same for any number of workers and processes.

A task with batches of its own kind (images grouped by aspect ratio, say) overrides `KeyedSampler.order`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from utils import UserError, key_seed

REPEAT_ROUND = 256  # an epoch of repeated augmentation has a multiple of this many samples


class SampleKey(NamedTuple):
    """Names a sample of an epoch; together with the seed, the key of all its randomness."""

    epoch: int
    index: int
    repeat: int


@dataclass(frozen=True)
class KeyedSampler:
    """The order of training samples.

    The order of an epoch is a permutation keyed on (seed, epoch). Micro-step s takes the s-th piece of
    G = batch_size · world_size samples; a rank takes every world_size-th of the piece. What is left
    over at the end, less than accum_iter · G samples, is not used in that epoch.

    With repeats > 1 it is DeiT's RASampler (Hoffer et al. 2020, "Augment your batch"; Berman et al. 2019):
    each sample comes `repeats` times in a row, hence on different ranks and under different keys, and the
    epoch ends after as many samples as the data set has, rounded down to a multiple of 256 if it has so many.

    Args:
        size: samples in the data set.
        batch_size: samples a rank and micro-step.
        accum_iter: micro-steps an optimiser step; an epoch has whole optimiser steps.
        probabilities: draw samples with replacement, each with its probability, instead of permuting them.

    Raises:
        UserError: the data set is smaller than one optimiser step.
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
        """Micro-steps an epoch."""
        rounded = self.repeats > 1 and self.size >= REPEAT_ROUND
        samples = self.size // REPEAT_ROUND * REPEAT_ROUND if rounded else self.size
        return samples // (self.batch_size * self.world_size * self.accum_iter) * self.accum_iter

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's samples: a permutation of all, or as many drawn by their probabilities."""
        key = key_seed(self.seed, "order", epoch)
        # RandomState's streams are frozen for good, those of numpy's and torch's generators may change.
        generator = np.random.RandomState([key & 0xFFFFFFFF, key >> 32])
        if self.probabilities is None:
            return generator.permutation(self.size)
        return generator.choice(self.size, self.size, p=self.probabilities)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[SampleKey]]:
        """This rank's batches of an epoch, from micro-step `start_step` on."""
        order = self.order(epoch)
        piece = self.batch_size * self.world_size
        for step in range(start_step, len(self)):
            positions = range(step * piece + self.rank, (step + 1) * piece, self.world_size)
            yield [SampleKey(epoch, int(order[p // self.repeats]), p % self.repeats) for p in positions]


@dataclass(frozen=True)
class EvaluationSampler:
    """A rank's batches for evaluation: every world_size-th image, none twice and none added."""

    size: int
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __len__(self) -> int:
        return -(-len(range(self.rank, self.size, self.world_size)) // self.batch_size)

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[list[SampleKey]]:
        keys = [SampleKey(0, index, 0) for index in range(self.rank, self.size, self.world_size)]
        return (keys[step * self.batch_size :][: self.batch_size] for step in range(start_step, len(self)))
