"""What can go wrong, made to go wrong at a chosen point: run in a forked child, before the project's main.

A fault is named with its arguments in JSON (`Launcher.train(faults=[("at", {...})])`). Nothing of the project
knows of these: they hook torch's global hooks, the profiler of the interpreter, or the system calls.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from torch.optim import optimizer as torch_optimizer

import engine
from runtime import checkpoints, curves
from runtime.cli import run_cli
from training import classification


def train(main: str, argv: Sequence[str], faults: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """The child's whole life: set the faults, then what ``python MAIN.py argv...`` would do."""
    sys.argv = [f"{main}.py", *argv]
    curves.draw_curves = draw_nothing
    for name, how in faults:
        FAULTS[name](**how)
    run_cli(importlib.import_module(main).main)


def draw_nothing(*_: Any) -> Figure:
    """An empty picture: drawing axes takes longer than all else in a tiny run, and is not what is tested."""
    return Figure(figsize=(1, 1), dpi=20)


# --------------------------------------------------------------------------------------------- events
def at(event: str, n: int, action: str, **how: Any) -> None:
    """Take ``action`` when ``event`` happens for the n-th time (from 1) in this process."""
    happened = 0
    process = os.getpid()

    def count(context: Any = None) -> Any:
        nonlocal happened
        if os.getpid() != process:  # a forked loader worker
            return None
        happened += 1
        return ACTIONS[action](context, **how) if happened == n else None

    EVENTS[event](count)


def on_update(call: Callable[[Any], Any]) -> None:
    """Before an update of the weights; the context is the optimiser."""
    torch_optimizer.register_optimizer_step_pre_hook(lambda optimizer, *_: call(optimizer) and None)


def on_updated(call: Callable[[Any], Any]) -> None:
    """After an update of the weights; the context is the optimiser."""
    torch_optimizer.register_optimizer_step_post_hook(lambda optimizer, *_: call(optimizer) and None)


def after(module: Any, function: str) -> Callable[[Callable[[Any], Any]], None]:
    """After a function of a module; the context is its result, which the action may replace.

    Hooks of all modules would make models take the slower way that hooks need, which has other last bits.
    """

    def register(call: Callable[[Any], Any]) -> None:
        real = getattr(module, function)

        def called(*args: Any) -> Any:
            result = real(*args)
            replaced = call(result)
            return result if replaced is None else replaced

        setattr(module, function, called)

    return register


def on_sync(call: Callable[[Any], Any]) -> None:
    """Inside a save: after the bytes of a checkpoint are written and before they are on the disk."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if "checkpoint" in os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")):
            call(descriptor)
        real(descriptor)

    os.fsync = fsync


EVENTS = {
    "update": on_update,
    "updated": on_updated,
    "training": after(engine, "step_loss"),
    "evaluation": after(classification, "count"),
    "save": on_sync,
}


# -------------------------------------------------------------------------------------------- actions
def send(context: Any, signum: int, times: int = 1) -> None:
    """Send this process a signal; the interpreter's handler runs at once."""
    for _ in range(times):
        os.kill(os.getpid(), signum)


def kill_worker(context: Any) -> None:
    """SIGKILL a loader worker."""
    psutil.Process().children()[0].kill()


def kill_self(context: Any) -> None:
    """SIGKILL this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def pause(context: Any, report: str) -> None:
    """Say that the point is reached, and wait to be killed."""
    Path(report).write_text("")
    while True:
        time.sleep(0.05)


def poison_loss(loss: torch.Tensor, value: float) -> torch.Tensor:
    """Make the loss NaN or infinite."""
    return loss * value


def poison_gradient(loss: torch.Tensor, value: float) -> None:
    """Leave the loss as it is, and make its gradient NaN or infinite."""
    loss.register_hook(lambda gradient: gradient * value)


ACTIONS = {
    "send": send,
    "kill_worker": kill_worker,
    "kill_self": kill_self,
    "pause": pause,
    "poison_loss": poison_loss,
    "poison_gradient": poison_gradient,
}


# ----------------------------------------------------------------------------------- kill -9 anywhere
def kill_anywhere(scope: str, n: int = 0, report: str = "") -> None:
    """SIGKILL this process at the n-th call or return of any Python or C function (0: never).

    ``scope``: "run", or "save" to count only what happens inside `checkpoints.save`, system calls too.
    ``report``: file to which the count of a whole run is written at its end.
    """
    counted = 0
    depth = 0
    process = os.getpid()
    save = checkpoints.save.__code__

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal counted, depth
        if scope == "save":
            if frame.f_code is save and event in ("call", "return"):
                depth += 1 if event == "call" else -1
            if depth == 0:
                return
        counted += 1
        if counted == n and os.getpid() == process:
            os.kill(process, signal.SIGKILL)

    if report:
        real_exit = sys.exit

        def leave(*args: Any) -> None:
            sys.setprofile(None)
            Path(report).write_text(str(counted))
            real_exit(*args)

        sys.exit = leave
    sys.setprofile(profile)


# --------------------------------------------------------------------------------------------- traces
class Trace:
    """Appends JSON lines to a file, each in one write: a kill loses at most the line being written."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def __call__(self, **entry: Any) -> None:
        os.write(self.descriptor, (json.dumps(entry) + "\n").encode())


def trace_reads(path: str) -> None:
    """For every sample: that it is read; for every step: the samples that were trained on."""
    from inputs.loader import KeyedSamples, TrainLoader
    from inputs.sampler import SampleKey

    trace = Trace(path)
    read = KeyedSamples.__getitem__
    epoch = TrainLoader.epoch

    def reading(self: KeyedSamples, key: SampleKey) -> Any:
        trace(kind="read", epoch=key.epoch, index=key.index, path=self.dataset.path(key.index))
        return read(self, key)

    def stepping(self: TrainLoader, number: int, start_step: int = 0) -> Any:
        for step, batch in enumerate(epoch(self, number, start_step), start_step):
            trace(kind="batch", epoch=number, step=step, indices=batch.indices.tolist())
            yield batch

    KeyedSamples.__getitem__ = reading
    TrainLoader.epoch = stepping


# ---------------------------------------------------------------------------------------------- disks
def full_disk(after: int) -> None:
    """Let no file grow beyond so many bytes: the kernel then refuses as for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


# -------------------------------------------------------------------------------------------- outputs
def lose_output(streams: Sequence[int], way: str) -> None:
    """Nobody takes what these descriptors get: their disk is full, they are closed, or their reader has left."""
    for number in streams:
        if way == "closed":
            os.close(number)
            continue
        reader, end = (None, os.open("/dev/full", os.O_WRONLY)) if way == "full" else os.pipe()
        os.dup2(end, number)
        for descriptor in (end, reader):
            if descriptor is not None:
                os.close(descriptor)


FAULTS = {
    "at": at,
    "kill_anywhere": kill_anywhere,
    "trace_reads": trace_reads,
    "full_disk": full_disk,
    "lose_output": lose_output,
}
