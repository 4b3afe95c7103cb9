"""What can go wrong, made to go wrong at a chosen point: run in a forked child, before the project's main.

A fault is named with its arguments in JSON (`Launcher.train(faults=[("at", {...})])`). Nothing of the project
knows of these: they hook torch's global hooks, the profiler of the interpreter, or the system calls.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
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

import torch
from harness import children_of, digest
from matplotlib.figure import Figure
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as torch_optimizer

import engine
import utils
from runtime import checkpoints, run_directory
from runtime.cli import run_cli


def train(main: str, argv: Sequence[str], faults: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """The child's whole life: set the faults, then what ``python MAIN.py argv...`` would do."""
    sys.argv = [f"{main}.py", *argv]
    run_directory.draw_curves = draw_nothing
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
    torch_optimizer.register_optimizer_step_pre_hook(
        lambda optimizer, args, kwargs: call(optimizer) if is_the_models(optimizer) else None
    )


def on_updated(call: Callable[[Any], Any]) -> None:
    """After an update of the weights; the context is the optimiser."""
    torch_optimizer.register_optimizer_step_post_hook(
        lambda optimizer, args, kwargs: call(optimizer) if is_the_models(optimizer) else None
    )


def is_the_models(optimizer: torch.optim.Optimizer) -> bool:
    """Resuming tries out the optimiser on single weights."""
    return sum(len(group["params"]) for group in optimizer.param_groups) > 1


def on_forward(training: bool) -> Callable[[Callable[[Any], Any]], None]:
    """After the outermost module's forward in training or evaluation; the context is its output, which the
    action may replace."""

    def register(call: Callable[[Any], Any]) -> None:
        depth = 0

        def enter(module: torch.nn.Module, args: Any) -> None:
            nonlocal depth
            depth += 1

        def leave(module: torch.nn.Module, args: Any, output: Any) -> Any:
            nonlocal depth
            depth -= 1
            is_model = depth == 0 and isinstance(output, torch.Tensor) and output.dim() == 2  # and not a loss
            return call(output) if is_model and module.training == training else None

        nn_module.register_module_forward_pre_hook(enter)
        nn_module.register_module_forward_hook(leave)

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
    "training": on_forward(True),
    "evaluation": on_forward(False),
    "save": on_sync,
}


# -------------------------------------------------------------------------------------------- actions
def send(context: Any, signum: int, times: int = 1) -> None:
    """Send this process a signal; the interpreter's handler runs at once."""
    for _ in range(times):
        os.kill(os.getpid(), signum)


def kill_worker(context: Any, report: str) -> None:
    """SIGKILL a loader worker, and note when."""
    worker = children_of(os.getpid())[0]
    os.kill(worker, signal.SIGKILL)
    Path(report).write_text(str(time.time()))


def kill_self(context: Any, report: str) -> None:
    """SIGKILL this process, and note when."""
    Path(report).write_text(str(time.time()))
    os.kill(os.getpid(), signal.SIGKILL)


def pause(context: Any, report: str) -> None:
    """Say that the point is reached and wait to be killed or signalled from outside."""
    Path(report).write_text(str(os.getpid()))
    while True:
        time.sleep(0.05)


def poison_loss(output: torch.Tensor, value: float, report: str) -> torch.Tensor:
    """Make the output, and so the loss, NaN or infinite."""
    Path(report).write_text(str(time.time()))
    return output * value


def poison_gradient(output: torch.Tensor, value: float, report: str) -> None:
    """Leave the loss as it is, and make its gradient NaN or infinite."""
    Path(report).write_text(str(time.time()))
    output.register_hook(lambda gradient: gradient * value)


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


def trace_updates(path: str) -> None:
    """For every update: the step's key, the learning rates, weight decays, the state of the random generators
    before it, the parameters and the average of them after it; the parameters when an update is refused."""
    trace = Trace(path)
    key: list[Any] = []
    seed_step = utils.seed_step

    def noted(*parts: Any) -> None:
        key[:] = parts
        seed_step(*parts)

    utils.seed_step = engine.seed_step = noted

    def before(optimizer: torch.optim.Optimizer) -> None:
        groups = [[group["lr"], group["weight_decay"]] for group in optimizer.param_groups]
        trace(kind="update", key=key, groups=groups, rng=digest(torch.get_rng_state()))

    def after(optimizer: torch.optim.Optimizer) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        trace(kind="updated", key=key, parameters=digest(parameters))
        held[:] = parameters

    held: list[torch.Tensor] = []
    leaving = utils.NonFiniteError.__init__

    def refused(self: utils.NonFiniteError, *args: Any) -> None:
        leaving(self, *args)
        trace(kind="refused", parameters=digest(held))

    utils.NonFiniteError.__init__ = refused

    on_update(before)
    on_updated(after)

    from timm.utils import ModelEmaV3

    update = ModelEmaV3.update

    def averaged(self: ModelEmaV3, *args: Any, **kwargs: Any) -> None:
        update(self, *args, **kwargs)
        trace(kind="averaged", key=key, average=digest(self.module.state_dict()))

    ModelEmaV3.update = averaged


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


def trace_writes(path: str, below: str) -> None:
    """The calls that decide whether a file below a folder is written safely, in order."""
    trace = Trace(path)
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def audit(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | os.PathLike) and str(args[0]).startswith(below):
            flags = args[2] or 0
            writes = (isinstance(args[1], str) and any(c in args[1] for c in "wax+")) or flags & (
                os.O_WRONLY | os.O_RDWR | os.O_CREAT
            )
            if writes:
                trace(call="open", path=str(args[0]))

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        size = os.fstat(descriptor).st_size
        if name.startswith(below):
            trace(call="fsync", path=name, size=size)

    def moved(real: Callable) -> Callable:
        def move(source: Any, target: Any, **how: Any) -> None:
            size = os.stat(source).st_size
            real(source, target, **how)
            if str(target).startswith(below):
                trace(call="replace", path=str(source), target=str(target), size=size)

        return move

    sys.addaudithook(audit)
    os.fsync, os.replace, os.rename = synced, moved(replace), moved(rename)


# ---------------------------------------------------------------------------------------------- disks
class FullDisk(io.FileIO):
    """A file on a disk that has a number of bytes left: it takes those, then raises ENOSPC."""

    left = 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        if len(view) and FullDisk.left <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        written = super().write(view[: FullDisk.left])
        FullDisk.left -= written
        return written


def full_disk(after: int, match: str = "") -> None:
    """Let the disk be full after so many bytes more in files whose path contains ``match``."""
    FullDisk.left = after
    _replace_open(lambda name: match in name, FullDisk)


def read_only(match: str) -> None:
    """Refuse, with EROFS, to open files for writing whose path contains ``match``, as read-only mounts do."""

    def refuse(name: Any, mode: str, **how: Any) -> io.FileIO:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), name)

    _replace_open(lambda name: match in name, refuse)


def _replace_open(applies: Callable[[str], bool], opener: Callable[..., io.FileIO]) -> None:
    """Make every Python-level way to open a file for writing go through ``opener(path, mode)``."""
    real_open, real_os_open = builtins.open, os.open

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: Any = None,
        errors: Any = None,
        newline: Any = None,
        closefd: bool = True,
        **other: Any,
    ) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+") or not applies(os.fspath(file)):
            return real_open(file, mode, buffering, encoding, errors, newline, closefd, **other)
        raw = opener(file, mode.replace("b", "").replace("t", ""))
        if "b" in mode and buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def os_opened(path: Any, flags: int, *args: Any, **how: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR) and opener is not FullDisk and applies(os.fspath(path)):
            opener(path, "w")
        return real_os_open(path, flags, *args, **how)

    builtins.open = io.open = opened
    os.open = os_opened


def file_limit(size: int) -> None:
    """Let the kernel itself refuse files longer than ``size`` bytes (EFBIG), whoever writes them."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# -------------------------------------------------------------------------------------------- outputs
def lose_output(streams: Sequence[int], way: str) -> None:
    """Nobody takes what these descriptors get: their disk is full, they are closed, their reader has left or leaves
    after the third update."""
    ends = []
    for number in streams:
        if way == "closed":
            os.close(number)
            continue
        if way == "full":
            end = os.open("/dev/full", os.O_WRONLY)
        else:
            reader, end = os.pipe()
            ends.append(reader)
        os.dup2(end, number)
        os.close(end)

    def leave(context: Any = None) -> None:
        while ends:
            os.close(ends.pop())

    if way == "left":
        leave()
    updates = iter(range(3))
    on_updated(lambda context: leave() if next(updates, None) is None else None)


FAULTS = {
    "lose_output": lose_output,
    "at": at,
    "kill_anywhere": kill_anywhere,
    "trace_updates": trace_updates,
    "trace_reads": trace_reads,
    "trace_writes": trace_writes,
    "full_disk": full_disk,
    "read_only": read_only,
    "file_limit": file_limit,
}
