"""Evaluation in step: all processes take a batch at a time, and stop together."""

import sys
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from runtime.processes import Distributed
from utils import Interrupted, StopSignals


def evaluation_batches(loader: Any, dist: Distributed, stop: StopSignals | None = None) -> Iterator[Any]:
    """This process's batches, one a round of all processes; with a bar on a terminal.

    Args:
        loader: its `rounds` are the largest number of batches that a process has.

    Raises:
        Interrupted: between two batches, on every process, when one of them was signalled.
    """
    batches = iter(loader)
    shown = dist.is_main and sys.stderr.isatty()
    for _ in tqdm(range(loader.rounds), "evaluation", disable=not shown, leave=False, unit=" batches", bar_format=BAR):
        if stop is not None and (signum := dist.max(stop.signum or 0)):
            raise Interrupted(signum)
        batch = next(batches, None)
        if batch is not None:
            yield batch


# No bar: an ImageNet epoch's figures then fit into 80 columns.
BAR = "{desc}: {percentage:3.0f}% of {total_fmt} [{remaining}, {rate_fmt}{postfix}]"
