"""What the tests run in forked children beside whole trainings: many small cases in one process."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import resource
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from harness import digest

import engine
from datasets import build_data
from inputs.images import ImageArrays
from inputs.loader import EvalLoader, KeyedImages
from inputs.transforms import eval_transform
from runtime import checkpoints
from runtime.cli import run_cli
from runtime.processes import Distributed, close_distributed, init_distributed
from training.classification import evaluate
from training.classification_flags import FLAGS
from training.options import parse_args
from training.precision import Precision


@dataclass(frozen=True)
class Alone(Distributed):
    """A place in a job whose other processes are not there: for what needs no word from them."""

    def barrier(self) -> None:
        """Nobody to wait for."""


def order_traces(argv: Sequence[str], images: int, epochs: Sequence[int], report: str) -> None:
    """{"workers world": [[index, digest of the augmented image], ...] in the order of the whole job}."""
    traces = {}
    for world in range(1, 5):
        for workers in range(4):
            args = parse_args(FLAGS, [*argv, "--batch-size", str(images // world), "--num-workers", str(workers)])
            loaders = [build_data(args, Alone(rank, world)).train for rank in range(world)]
            trace = []
            for epoch in epochs:
                # A later start has to be the same order with its beginning cut off.
                for steps in zip(*(loader.epoch(epoch, epoch % 2) for loader in loaders), strict=True):
                    order = [
                        (int(batch.indices[i]), digest(batch.images[i]))
                        for i in range(images // world)
                        for batch in steps
                    ]
                    trace += order
            traces[f"{workers} {world}"] = trace
    Path(report).write_text(json.dumps(traces))


def evaluate_sizes(sizes: Sequence[int], batches: Sequence[int], report: str) -> None:
    """{"size batch": [correct1, correct5, images]} of a fixed model, by classification's `evaluate` in this job."""
    dist = init_distributed("cpu")
    images = np.random.RandomState(0).randint(0, 256, (max(sizes), 8, 8, 3)).astype(np.uint8)
    labels = np.random.RandomState(1).randint(0, 10, max(sizes))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 8 * 3, 10)).double()
    transform = eval_transform((8, 8), crop_pct=1.0)
    counts = {}
    for size in sizes:
        dataset = KeyedImages(ImageArrays("noise", images[:size], labels[:size], list("0123456789")), transform, 0)
        for batch in batches:
            loader = EvalLoader(dataset, batch, dist)
            found = evaluate(model, loader, dist, Precision(dist.device, torch.float64, None))
            counts[f"{size} {batch}"] = [found["correct1"], found["correct5"], found["images"]]
    if dist.is_main:
        Path(report).write_text(json.dumps(counts))
    close_distributed()


class Accepted(BaseException):
    """A command line got as far as the first training step."""


def _accept(*_: Any) -> None:
    raise Accepted


def run_command(main: str, argv: Sequence[str]) -> dict[str, Any]:
    """{"code": exit code or "accepted", "err": stderr, "out": stdout} of a command line, run here."""
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [f"{main}.py", *argv]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli(importlib.import_module(main).main)
        except SystemExit as leave:
            code = leave.code
        except Accepted:
            code = "accepted"
    return {"code": code, "err": err.getvalue(), "out": out.getvalue()}


def commands(cases: str, report: str) -> None:
    """Run command lines, [[main, argument...], ...], one after the other in this process; none may train."""
    with mock.patch.object(engine, "train_one_epoch", _accept):
        results = [run_command(main, argv) for main, *argv in json.loads(Path(cases).read_text())]
    Path(report).write_text(json.dumps(results))


def limit_memory(mebibytes: int) -> None:
    """Let this process have so much more memory than it has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (mebibytes << 20), resource.RLIM_INFINITY))


def watched(cases: str, forbidden: str, report: str) -> None:
    """Run command lines like `commands`; "opened" of each result: connections, programs and the forbidden file."""
    opened: list[str] = []

    def audit(event: str, args: tuple) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "urllib.Request", "subprocess.Popen", "os.system"):
            opened.append(f"{event} {args!r:.100}")
        elif event == "open" and str(args[0]) == forbidden:
            opened.append(forbidden)

    sys.addaudithook(audit)
    results = []
    with mock.patch.object(engine, "train_one_epoch", _accept):
        for main, *argv in json.loads(Path(cases).read_text()):
            opened.clear()
            results.append(run_command(main, argv) | {"opened": list(opened)})
    Path(report).write_text(json.dumps(results))


class TooLong(BaseException):
    """An input took more of the processor's time than any may."""


@contextlib.contextmanager
def bounded(mebibytes: int, seconds: float) -> Iterator[None]:
    """At most so much more memory in the block, and so much of the processor's time: else `TooLong`."""

    def end(*_: object) -> None:
        raise TooLong

    limit_memory(mebibytes)
    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def write_again_and_again(path: str, times: int) -> None:
    """Replace a checkpoint that tells its own number, many times."""
    for number in range(times):
        checkpoints.save(path, {"model": {"weight": torch.full((64, 64), float(number))}, "epoch": number})
