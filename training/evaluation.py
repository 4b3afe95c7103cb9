"""Synchronized evaluation: all processes evaluate batch by batch and stop together."""

from collections.abc import Iterator
from typing import Any

import torch
from tqdm import tqdm

from runtime.processes import Distributed
from utils import Interrupted, StopSignals


def evaluation_batches(loader: Any, dist: Distributed, stop: StopSignals | None = None) -> Iterator[Any]:
    """Yield this process's batches, one per round of all processes (`loader.rounds`), with a progress bar.

    Raises:
        Interrupted: between two batches, on every process, if any of them received a signal.
    """
    batches = iter(loader)
    off = None if dist.is_main else True  # None: only without a terminal
    for _ in tqdm(range(loader.rounds), "evaluation", disable=off, leave=False, unit=" batches", bar_format=BAR):
        if stop is not None and dist.sum(torch.tensor(stop.signum or 0)):  # on the CPU, so it never waits for a GPU
            raise Interrupted(max(dist.gather_objects(stop.signum or 0)))
        batch = next(batches, None)
        if batch is not None:
            yield batch


# Without the bar itself, the numbers of an ImageNet epoch fit into 80 columns.
BAR = "{desc}: {percentage:3.0f}% of {total_fmt} [{remaining}, {rate_fmt}{postfix}]"
