"""Samples by key: what every task's data has in common.

A task subclasses `KeyedSamples` and says how a sample is read, how samples are collated and how a batch is put
on the device; `loader` does the rest and looks into none of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from inputs.image_sets import NamedImages
from inputs.images import BadImage
from inputs.sampler import SampleKey
from inputs.settings import LoaderSettings
from utils import UserError, key_seed, seeded

REPLACEMENT_TRIES = 100


class Skipped(NamedTuple):
    """An unreadable image, and why it is."""

    path: str
    reason: str


class Sample(NamedTuple):
    """What `KeyedSamples.read` gave for the image `index`, which stands in for the `skipped` ones."""

    content: Any
    index: int
    skipped: tuple[Skipped, ...]


class LoadedBatch(NamedTuple):
    """What a worker hands over. content: as `KeyedSamples.collate` gave it; indices: int64 (B,)."""

    content: Any
    indices: Tensor
    skipped: tuple[Skipped, ...]


class KeyedSamples(Dataset, ABC):
    """The samples of a data set by key, without any random state: a key always gives the same sample."""

    def __init__(self, dataset: NamedImages, seed: int, skip_bad_images: bool = False):
        """skip_bad_images: put other samples in the place of unreadable ones; else the first ends the run."""
        self.dataset = dataset
        self._seed = seed
        self._skip_bad_images = skip_bad_images

    @abstractmethod
    def read(self, index: int) -> Any:
        """A sample, augmented by draws from the global random generators; raises `BadImage` or UserError."""

    def collate(self, contents: list[Any]) -> Any:
        """The samples of a batch as one: tensors, or containers of them. Runs in a worker process."""
        return default_collate(contents)

    @abstractmethod
    def placement(self, settings: LoaderSettings) -> Callable[[Any, Tensor], Any]:
        """A function of what `collate` gave and of the samples' indices that makes a batch on the device."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample | UserError:
        """The sample, or the error met: one raised in a worker would reach the user as a traceback."""
        skipped = []
        for index in self._candidates(key):
            try:
                with seeded(self._seed, key.epoch, index, key.repeat):
                    return Sample(self.read(index), index, tuple(skipped))
            except BadImage as error:
                if not self._skip_bad_images:
                    return error
                skipped.append(Skipped(self.dataset.path(index), str(error)))
            except UserError as error:
                return error
        return UserError(f"{skipped[0].reason}; nor can any of {REPLACEMENT_TRIES} others tried in its place")

    def _candidates(self, key: SampleKey) -> Iterator[int]:
        """The sample itself, then those that may stand in for it, each with its own label."""
        yield key.index
        for attempt in range(REPLACEMENT_TRIES):
            yield key_seed(self._seed, "replacement", *key, attempt) % len(self.dataset)

    def join(self, samples: list[Sample]) -> LoadedBatch:
        """The samples of a batch as one."""
        contents, indices, skipped = zip(*samples, strict=True)
        return LoadedBatch(self.collate(list(contents)), torch.tensor(indices), sum(skipped, ()))


def collate(samples: Sequence[Any], join: Callable[[Sequence[Any]], Any] = default_collate) -> Any:
    """What `join` makes of the samples, or the first UserError among them."""
    failed = next((sample for sample in samples if isinstance(sample, UserError)), None)
    return join(samples) if failed is None else failed
