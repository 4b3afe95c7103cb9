"""Timing of runs that take turns."""

import statistics
import time
from collections.abc import Callable

import torch

from .settings import DTYPES, Settings

Seconds = dict[str, list[float]]  # of each contestant, in each round

WARM_UP = {"cpu": 1, "cuda": 5}


def measure(run: Callable[[], object], device: str) -> float:
    """Seconds `run` takes: device events on CUDA, the wall clock on a CPU."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    begin_time = time.perf_counter()
    run()
    return time.perf_counter() - begin_time


def take_turns(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> Seconds:
    """Time all runs in every round, after warming up; every other round goes through them backwards."""
    for run in runs.values():
        for _ in range(WARM_UP[device]):
            run()
    seconds: Seconds = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seconds[name].append(measure(runs[name], device))
    return seconds


def speed_ratio(seconds: Seconds, one: str, other: str) -> float:
    """How many times as fast as `other` `one` is: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True))


def matmul_rate(settings: Settings) -> float:
    """Multiply-adds a second of a large matrix product: the peak that utilisation is a fraction of."""
    side = 8192 if settings.device == "cuda" else 1024
    one, other = torch.randn(2, side, side, device=settings.device, dtype=DTYPES[settings.dtype])
    return side**3 / statistics.median(take_turns({"": lambda: one @ other}, 10, settings.device)[""])
