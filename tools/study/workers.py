"""Runs of a study, side by side, each a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from training.options import available_cores
from utils import Interrupted, StopSignals

from .cell import STUDY

ROOT = Path(__file__).resolve().parents[2]
POLL = 0.05  # seconds
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Job:
    """A cell and its seed; where its run writes, and what it says."""

    cell: str
    seed: int
    directory: Path

    @property
    def console(self) -> Path:
        return self.directory.with_name(f"{self.directory.name}.log")


def devices(workers: int | None) -> list[str]:
    """A device for each worker: every GPU, in turn if there are more workers, or else the CPU for each core."""
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    workers = workers or len(found) or available_cores()
    return [found[i % len(found)] if found else "cpu" for i in range(workers)]


def run_side_by_side(
    jobs: Sequence[Job], places: Sequence[str], command: Callable[[Job, str], list[str]]
) -> Iterator[tuple[Job, int]]:
    """Run `command` of each job and one of the devices, at most one a place; yields jobs with their exit codes.

    A run on the CPU has one thread, so that its results are the same however many others there are. When this ends
    early the runs save and leave; when this process is killed they are ended with it.

    Raises:
        Interrupted: a stop signal came, and all runs have left.
    """
    waiting, free = list(jobs), list(places)
    running: dict[subprocess.Popen, tuple[Job, str]] = {}
    with StopSignals(announced=True) as stop, _pipe() as pipe:
        try:
            while waiting or running:
                while waiting and free:
                    job, place = waiting.pop(0), free.pop(0)
                    running[_start(job, place, command(job, place), pipe)] = job, place
                ended = next((process for process in running if process.poll() is not None), None)
                if stop.signum is not None:
                    raise Interrupted(stop.signum)
                if ended is None:
                    time.sleep(POLL)
                    continue
                job, place = running.pop(ended)
                free.append(place)
                yield job, ended.returncode
        finally:
            for process in running:
                process.send_signal(signal.SIGTERM)
            for process in running:
                process.wait()


@contextmanager
def _pipe() -> Iterator[int]:
    """The end to read of a pipe to which nobody writes: it ends with this process, however that ends."""
    read_end, write_end = os.pipe()
    try:
        yield read_end
    finally:
        os.close(read_end)
        os.close(write_end)


def _start(job: Job, place: str, command: list[str], pipe: int) -> subprocess.Popen:
    job.console.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {STUDY: str(pipe)} | (ONE_THREAD if place == "cpu" else {})
    with job.console.open("ab") as console:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            pass_fds=(pipe,),
        )
