"""Loaders: worker processes read keyed samples in batches, which are then moved to the device.

A task subclasses `KeyedSamples` to define how samples are read and collated.
"""

import atexit
import math
import multiprocessing
import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, default_collate

from inputs.images import BadImage
from inputs.label_maps import image_map_path, read_label_map
from inputs.sampler import KeyedSampler, SampleKey
from inputs.transforms import RandomErasing
from runtime.processes import Distributed
from utils import UserError, key_seed, seeded, tell

REPLACEMENT_TRIES = 100


class Batch(NamedTuple):
    """A batch, or a single sample without the dimension B.

    images: (B, C, H, W), uint8 from a worker, normalised float32 on the device; for a detector, a list of uint8
        (3, H, W).
    targets: int64 (B,), the collated records of token labels, or a detector's list of dicts.
    indices: int64 (B,) on the CPU, for ``dataset.path``.
    erased: the boxes of `RandomErasing` (B, count, 5), or None.
    skipped: unreadable images, path to reason.
    """

    images: Any
    targets: Any
    indices: Any
    erased: Tensor | None = None
    skipped: dict[str, str] = {}


@dataclass(eq=False)
class KeyedSamples(Dataset, ABC):
    """The samples of a data set by key; a key always gives the same sample.

    Args:
        dataset: has a length and a name for each image, ``path(index)``.
        transform: applied to each image, see the subclasses.
        skip_bad_images: leave out unreadable images; otherwise, the first one ends the run.
        replacements: number of other images to try instead of an unreadable one; 0 in evaluation.
    """

    dataset: Any
    transform: Callable | None = None
    seed: int = 0
    skip_bad_images: bool = False
    replacements: int = REPLACEMENT_TRIES

    @abstractmethod
    def read(self, index: int) -> Batch:
        """Read and augment a sample, using the global random generators; raises `BadImage` or UserError."""

    def collate(self, samples: Sequence[Batch]) -> Batch:
        """Collate the samples of a batch, except for `skipped`; runs in a worker process."""
        images, targets, indices, erased, _ = zip(*samples, strict=True)
        boxes = None if erased[0] is None else default_collate(erased)
        return Batch(default_collate(images), default_collate(targets), torch.tensor(indices), boxes)

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Move the images and targets of the batch to the device."""
        return batch._replace(images=_move(batch.images, device), targets=_move(batch.targets, device))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Batch | UserError:
        """Return the sample or the error; if a worker raised the error, the user would see a traceback.

        For an unreadable image that is skipped without a replacement, the sample has no image.
        """
        skipped: dict[str, str] = {}
        index = key.index
        for attempt in range(self.replacements + 1):
            try:
                with seeded(self.seed, key.epoch, index, key.repeat):
                    return self.read(index)._replace(skipped=skipped)
            except UserError as error:
                if not (self.skip_bad_images and isinstance(error, BadImage)):
                    return error
                skipped[self.dataset.path(index)] = str(error)
            index = key_seed(self.seed, "replacement", *key, attempt) % len(self.dataset)
        if not self.replacements:
            return Batch(None, None, key.index, skipped=skipped)
        reason = next(iter(skipped.values()))
        return UserError(f"{reason}; none of {self.replacements} others tried instead could be read either")

    def join(self, samples: Sequence[Batch | UserError]) -> Batch | UserError:
        """Collate the samples of a batch, or return the first error among them."""
        failed = next((sample for sample in samples if isinstance(sample, UserError)), None)
        if failed is not None:
            return failed
        skipped = {path: reason for sample in samples for path, reason in sample.skipped.items()}
        readable = [sample for sample in samples if sample.images is not None]
        batch = self.collate(readable) if readable else Batch(None, None, torch.tensor([]))
        return batch._replace(skipped=skipped)


def _move(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {name: _move(item, device) for name, item in value.items()}
    return [_move(item, device) for item in value] if isinstance(value, list) else value


@dataclass(eq=False)
class KeyedImages(KeyedSamples):
    """A classifier's images, decoded and transformed by a worker, then normalised and erased on the device.

    Args:
        transform: from a PIL image to uint8 (C, H, W); with label maps, a `TokenLabelTransform`.
        mean, std: one value per channel, for pixels from 0 to 1.
        pixel_range: see `read_image`.
        label_maps: the folder of token-label maps, if any.
        erasing: random erasing, if any.
    """

    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
    pixel_range: Sequence[float] | None = None
    label_maps: str | None = None
    erasing: RandomErasing | None = None

    def __post_init__(self) -> None:
        # In units of uint8, so that images need not be divided by 255.
        self._mean, self._std = (255 * torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))

    def read(self, index: int) -> Batch:
        image, target = self.dataset.load(index, len(self.mean), self.pixel_range)
        if self.label_maps is None:
            image = self.transform(image)
        else:
            path = image_map_path(self.label_maps, self.dataset.path(index))
            image, target = self.transform(image, read_label_map(path, len(self.dataset.class_names)), target)
        erased = None if self.erasing is None else self.erasing.draw(*image.shape[-2:])
        return Batch(image, target, index, erased)

    def to_device(self, batch: Batch, device: torch.device) -> Batch:
        """Move the batch to the device, convert images to float32, normalise and erase them."""
        batch = super().to_device(batch, device)
        self._mean, self._std = self._mean.to(device), self._std.to(device)
        images = batch.images.float().sub_(self._mean).div_(self._std)
        if batch.erased is not None:
            images = self.erasing.erase(images, batch.erased)
        return batch._replace(images=images, erased=None)


class _Batches:
    """The batch sampler of a torch loader; `keys` is set before each epoch."""

    def __init__(self) -> None:
        self.keys: Iterable[list[SampleKey]] = []

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.keys)


class Loader:
    """This rank's batches, loaded by worker processes and moved to the device. Its length is their number per epoch.

    `TrainLoader` and `EvalLoader` define the order of the samples.
    """

    def __init__(
        self,
        samples: KeyedSamples,
        sampler: KeyedSampler | BatchSampler,
        dist: Distributed,
        num_workers: int = 0,
        pin_memory: bool = False,
    ):
        self.sampler = sampler
        self.dataset = samples.dataset
        self.skipped: dict[str, str] = {}  # the unreadable images found so far, path to reason
        self._samples = samples
        self._device = dist.device
        self._batches = _Batches()
        self._loader = DataLoader(
            samples,
            batch_sampler=self._batches,
            num_workers=num_workers,
            collate_fn=samples.join,
            pin_memory=pin_memory and self._device.type == "cuda",
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_signals,
            multiprocessing_context="fork" if num_workers > 0 else None,  # shares memory and starts fast
            generator=torch.Generator(),  # DataLoader draws a seed; this leaves the global generator unchanged
        )

    def __len__(self) -> int:
        return len(self.sampler)

    def _load(self, batches: Iterable[list[SampleKey]]) -> Iterator[Batch]:
        """Yield the batches with these samples; raises UserError for an unreadable file."""
        self._batches.keys = batches
        loaded_batches = iter(self._loader)
        if self._loader.num_workers > 0:
            atexit.unregister(_end_workers)
            atexit.register(_end_workers)  # registered last, it runs before torch's exit function, which waits
        for loaded in loaded_batches:
            if isinstance(loaded, UserError):
                raise loaded
            for path, reason in loaded.skipped.items():
                if path not in self.skipped:
                    self.skipped[path] = reason
                    tell(f"skipped: {reason}")
            if loaded.images is not None:
                yield self._samples.to_device(loaded, self._device)


def _ignore_signals(_worker: int) -> None:
    """Ignore signals in workers: a job may signal all of its processes, and the main process must save first."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill the workers when the main process ends, because they ignore SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch treats a killed worker as a failure
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


class TrainLoader(Loader):
    """This rank's training batches, in the order of a `KeyedSampler`."""

    sampler: KeyedSampler

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from micro-step `start_step`; raises UserError for an unreadable file."""
        return self._load(self.sampler.epoch(epoch, start_step))


class EvalLoader(Loader):
    """This rank's share of the evaluation images; each image belongs to exactly one rank.

    `rounds` is the largest number of batches of any rank; a rank may have one batch fewer, or none.
    """

    def __init__(
        self, samples: KeyedSamples, batch_size: int, dist: Distributed, num_workers: int = 0, pin_memory: bool = False
    ):
        keys = [SampleKey(0, index, 0) for index in range(dist.rank, len(samples), dist.world_size)]
        super().__init__(samples, BatchSampler(keys, batch_size, drop_last=False), dist, num_workers, pin_memory)
        self.rounds = math.ceil(len(samples) / dist.world_size / batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self._load(self.sampler)
