"""Batches read ahead by worker processes and put on the device, whatever a task's samples are."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from copy import copy
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from inputs.sampler import BatchOrder, SampleKey, evaluation_batches
from inputs.samples import KeyedSamples, LoadedBatch, collate
from inputs.settings import LoaderSettings
from inputs.workers import start_worker
from utils import UserError, tell


class _Batches:
    """The batches that the next pass over a torch loader reads; set before each pass."""

    def __init__(self) -> None:
        self.keys: Iterable[list[SampleKey]] = []

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.keys)


class DeviceLoader:
    """Reads batches in worker processes and puts them on the device, one ahead of the step on CUDA."""

    def __init__(self, samples: KeyedSamples, settings: LoaderSettings):
        self.dataset = samples.dataset
        self.skipped: dict[str, str] = {}  # the unreadable images met so far, path to reason
        self._placement = samples.placement(settings)
        self._batches = _Batches()
        device = settings.dist.device
        self._loader = DataLoader(
            samples,
            batch_sampler=self._batches,
            num_workers=settings.num_workers,
            collate_fn=partial(collate, join=samples.join),
            pin_memory=settings.pin_memory and device.type == "cuda",
            persistent_workers=settings.num_workers > 0,
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # of its own: the loader draws a number that nothing here uses
        )
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _read(self, batches: Iterable[list[SampleKey]]) -> Iterator[Any]:
        self._batches.keys = batches
        # Threads that a library starts in a worker as it is forked inherit this: see `start_worker`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            loaded_batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._stream is None:
            yield from map(self._on_device, loaded_batches)
            return
        ahead = None
        for loaded in loaded_batches:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                batch = self._on_device(loaded)
            if ahead is not None:
                yield ahead
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            ahead = batch
        if ahead is not None:
            yield ahead

    def _on_device(self, loaded: LoadedBatch | UserError) -> Any:
        if isinstance(loaded, UserError):
            # Not `loaded` itself, whose traceback would hold this frame, and this frame it: freed from such a cycle,
            # the workers do not hear of their end, and are waited for.
            raise copy(loaded)
        for path, reason in loaded.skipped:
            if path not in self.skipped:
                self.skipped[path] = reason
                tell(f"skipped: {reason}")
        return self._placement(loaded.content, loaded.indices)


class TrainLoader(DeviceLoader):
    """Training batches of this rank. Its length is the number of micro-steps an epoch."""

    def __init__(self, samples: KeyedSamples, sampler: BatchOrder, settings: LoaderSettings):
        super().__init__(samples, settings)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        """The batches of an epoch from micro-step `start_step` on; raises UserError at an unreadable file."""
        return self._read(self.sampler.epoch(epoch, start_step))


class EvalLoader(DeviceLoader):
    """This rank's share of the images to evaluate, each of them on exactly one rank.

    `rounds` is the largest number of batches that a rank has; ranks may differ by one, or have none.
    """

    def __init__(self, samples: KeyedSamples, settings: LoaderSettings):
        super().__init__(samples, settings)
        dist = settings.dist
        self._keys = evaluation_batches(len(samples), settings.batch_size, dist.rank, dist.world_size)
        self.rounds = len(evaluation_batches(len(samples), settings.batch_size, 0, dist.world_size))

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Any]:
        return self._read(self._keys)
