"""Starting and comparing runs, and what a run leaves behind."""

from __future__ import annotations

import atexit
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from models.checkpoints import read_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
FULL = os.environ.get("RELIABILITY") == "full"
HANG = 300  # seconds after which a run counts as hanging: a hundred times what one takes
# Fields of a log row that tell how fast the machine was, and nothing about the training.
TIMES = ("time", "seconds", "images_per_second", "throughput", "memory")

# A run of three epochs of four updates in about a second, with everything on that keeps state.
TINY = shlex.split(
    "--arch spectformer_xs --model-kwargs embed_dim=16 depth=2 num_heads=2 alpha=1 mlp_ratio=2 --input-size 32 "
    "--batch-size 8 --device cpu --epochs 3 --warmup-epochs 1 --drop-path 0.2 --model-ema --model-ema-decay 0.9 "
    "--lr 5e-3 --unscale-lr --reprob 0.25 --checkpoint-epochs 0"
)

# The same of a detector, on images of 64 pixels: two epochs of four updates.
TINY_DETECTION = shlex.split(
    "--arch spectformer_h_s --model-kwargs stem_width=8 embed_dims=(8,16,16,16) depths=(1,1,1,1) "
    "spectral_depths=(1,1,0,0) num_heads=(1,1,1,1) mlp_ratios=(2,2,2,2) --detector-kwargs fpn_channels=32 "
    "anchor_sizes=(4,8,16,32,64) detections=40 box_score_thresh=0.0 rpn_post_nms_top_n_train=50 "
    "rpn_post_nms_top_n_test=20 box_batch_size_per_image=32 --input-size 64 --min-size 48,64 --max-size 96 "
    "--batch-size 2 --device cpu --epochs 2 --warmup-updates 3 --decay-milestones 1 --drop-path 0.2 --no-freeze-bn "
    "--model-ema --model-ema-decay 0.9 --lr 1e-3 --checkpoint-epochs 0"
)


def count(reduced: int, full: int) -> int:
    """How many cases to try: the full count under RELIABILITY=full."""
    return full if FULL else reduced


def spread(low: int, high: int, number: int, *key: Any) -> list[int]:
    """``number`` sorted integers of [low, high), one drawn from each of as many equal parts."""
    drawn = random.Random(repr(key))
    edges = [low + (high - low) * i // max(number, 1) for i in range(number + 1)]
    return [drawn.randrange(a, max(b, a + 1)) for a, b in zip(edges, edges[1:], strict=False)]


# ------------------------------------------------------------------------------------------ processes
# Importing torch and timm takes seconds, a run of the tests one: each child is forked from a server that has them.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["faults", "children", "main_detection", "main_spectformer", "sklearn.datasets"])


def run_child(function: str, arguments: dict[str, Any], environment: dict[str, str], output: str) -> None:
    """Call ``module:function`` in a forked child, which this makes as a fresh process would be."""
    os.setsid()  # what a job leaves behind is found by its session
    os.environ.update(environment)
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    for descriptor, opened in ((1, os.open(f"{output}.out", flags)), (2, os.open(f"{output}.err", flags))):
        os.dup2(opened, descriptor)
        os.close(opened)
    # With inherited states, every child would draw the same numbers, which would hide a draw without a key.
    random.seed()
    np.random.seed()
    torch.seed()
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(**arguments)
    finally:
        atexit._run_exitfuncs()  # as an interpreter that ends does, and the processes of multiprocessing do not


@dataclass
class Child:
    """A process of the server; its exit code is negative for a signal."""

    process: multiprocessing.process.BaseProcess
    output: Path

    @property
    def out(self) -> str:
        return Path(f"{self.output}.out").read_text(errors="replace")

    @property
    def err(self) -> str:
        return Path(f"{self.output}.err").read_text(errors="replace")

    def wait(self, timeout: float = HANG) -> int:
        """The exit code; a process that is still there after ``timeout`` is killed and reported as a hang."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"a process hung for {timeout} s; its stderr ended:\n{self.err[-2000:]}")
        return self.process.exitcode

    def kill(self) -> None:
        """Kill the process, unless it has ended."""
        self.process.kill()
        self.process.join()

    def left_behind(self) -> list[int]:
        """Processes of its session that still live."""
        return [
            process.pid
            for process in psutil.process_iter()
            if process.pid != self.process.pid and session_of(process.pid) == self.process.pid and alive(process)
        ]


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class Launcher:
    """Starts children whose output goes to files of a directory."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.started = 0

    def start(self, function: str, environment: dict[str, str] | None = None, **arguments: Any) -> Child:
        """Fork a child that calls ``module:function`` with ``arguments``."""
        self.started += 1
        output = self.directory / f"job{self.started}"
        process = SERVER.Process(target=run_child, args=(function, arguments, environment or {}, str(output)))
        process.start()
        return Child(process, output)

    def start_job(self, function: str, world: int, *arguments: dict[str, Any]) -> list[Child]:
        """Start the processes of a job, as torchrun does, each with its own arguments."""
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        children = []
        for rank, own in enumerate(arguments):
            job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            environment = {name: str(value) for name, value in job.items()} | {"MASTER_ADDR": "127.0.0.1"}
            children.append(self.start(function, environment if world > 1 else {}, **own))
        return children

    def train(
        self,
        run_dir: Path,
        *flags: str,
        world: int = 1,
        workers: int = 0,
        faults: Sequence[Sequence] = (),
        faulty_rank: int | None = None,
        base: Sequence[str] = TINY,
        main: str = "main_spectformer",
    ) -> list[Child]:
        """Start a training in ``world`` processes; ``faults`` strike ``faulty_rank`` (None: every rank)."""
        argv = [*base, "--output-dir", str(run_dir), "--num-workers", str(workers), *flags]
        own = [list(faults) if faulty_rank in (None, rank) else [] for rank in range(world)]
        return self.start_job("faults:train", world, *({"main": main, "argv": argv, "faults": each} for each in own))

    def complete(self, run_dir: Path, *flags: str, **how: Any) -> list[Child]:
        """A training that has to end with exit code 0."""
        children = self.train(run_dir, *flags, **how)
        for child in children:
            code = child.wait()
            assert code == 0, f"exit {code}: {child.err[-3000:]}"
        return children


# ---------------------------------------------------------------------------------- what a run leaves
def digest(value: Any) -> str:
    """SHA-256 over a nest of containers, numbers and tensors, to the last bit."""
    return hashlib.sha256(b"".join(_chunks(value))).hexdigest()


def _chunks(value: Any) -> list[bytes]:
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return [f"{value.dtype}{tuple(value.shape)}".encode(), raw]
    if isinstance(value, dict):
        return [
            chunk
            for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))
            for chunk in (repr(key).encode(), *_chunks(item))
        ]
    if isinstance(value, list | tuple):
        return [b"[", *(chunk for item in value for chunk in _chunks(item)), b"]"]
    return [repr(value).encode()]


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of log.txt, without what depends on the machine's speed."""
    read = [json.loads(line) for line in (run_dir / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in TIMES)} for row in read]


def outcome(run_dir: Path) -> dict[str, str]:
    """The digests of all that a run has to reproduce: its last checkpoint part by part, and its log."""
    state = read_checkpoint(run_dir / "checkpoint_last.pth")
    parts = {key: digest(value) for key, value in state.items() if key not in ("args", "version")}
    return parts | {"log": digest(rows(run_dir))}


def differences(got: dict[str, str], expected: dict[str, str]) -> list[str]:
    """The names of the parts that differ."""
    return [key for key in sorted(got.keys() | expected.keys()) if got.get(key) != expected.get(key)]


def farthest(run_dir: Path, reference: Path) -> float:
    """The largest difference between two runs' weights."""
    one, other = (read_checkpoint(path / "checkpoint_last.pth")["model"] for path in (run_dir, reference))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def traced(path: Path) -> list[dict[str, Any]]:
    """The JSON lines that a fault's tracer appended; a killed process may have left half a line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1] if line]


def temporaries(directory: Path) -> list[str]:
    """Files that no finished run leaves: neither its products nor TensorBoard's events."""
    return sorted(
        path.name
        for path in directory.rglob("*")
        if path.is_file() and (".tmp" in path.name or path.name.startswith(".")) and "lock" not in path.name
    )


def one_line(text: str) -> bool:
    """Whether a message to the user is a single line and no traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    return len(lines) == 1 and "Traceback" not in text
