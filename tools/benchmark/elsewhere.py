"""A contender in a process of its own, which is how a model is used.

What memory the C library holds, and so how often a process asks the system for fresh pages, depends on all that ran in
it before: beside other models, those with large hidden tensors find what these have left.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

import torch

from utils import UserError

from .contenders import Contender, Runner


class RunnerElsewhere:
    """A `Runner` in a process of its own, which ends with the `with` that this is for."""

    def __init__(self, contender: Contender):
        self.contender = contender
        self._process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self._built = self._process.submit(_build, contender, torch.get_num_threads())

    def __enter__(self) -> RunnerElsewhere:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(cancel_futures=True)

    def call(self, function: Callable, *args: object) -> Any:
        """What `Runner.call` gives there; UserError if the process died, as one does that takes too much memory."""
        try:
            self._built.result()
            return self._process.submit(_call, function, args).result()
        except BrokenProcessPool:
            raise UserError(f"{self.contender.label}: the process that measures it died") from None

    def task(self, part: str) -> Callable[[], None]:
        """As `Runner.task`."""
        return partial(self.call, Runner.run, part)


def peak_memory(runner: Runner, part: str) -> float:
    """MiB that building the model and two training steps, or inferences, add to this process, if fresh.

    On CUDA it is what PyTorch allocated at most.
    """
    runner.run(part)
    runner.run(part)
    on_device = runner.settings.device == "cuda"
    return (torch.cuda.max_memory_allocated() if on_device else _resident_peak() - _resident_before) / 2**20


# Of the process elsewhere: its runner, and the bytes it had in memory before.
_runner: Runner
_resident_before: int


def _build(contender: Contender, threads: int) -> None:
    global _runner, _resident_before
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    torch.set_num_threads(threads)
    _resident_before = _resident_peak()
    _runner = Runner(contender)


def _call(function: Callable, args: tuple) -> Any:
    return _runner.call(function, *args)


def _resident_peak() -> int:
    """The most bytes this process has had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there includes the process this one was started by
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
