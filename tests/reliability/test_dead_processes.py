"""Rows 12 and 14, and torchrun's elastic restart: a job ends as one, or goes on as one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from harness import (
    DEATH_LIMIT,
    HANG,
    ROOT,
    TINY,
    Child,
    Launcher,
    alive,
    count,
    differences,
    file_digest,
    one_line,
    outcome,
    rows,
    spread,
    traced,
)

from models.checkpoints import read_checkpoint


def ended_after(children: list[Child], report: Path) -> tuple[list[int], float]:
    """The exit codes, and the seconds from what ``report`` noted to the last process's end."""
    codes = [child.wait() for child in children]
    while any(child.left_behind() for child in children) and time.time() - float(report.read_text()) < HANG:
        time.sleep(0.1)
    return codes, time.time() - float(report.read_text())


@pytest.mark.promise(12)
@pytest.mark.parametrize("part", [0, 1])
def test_a_non_finite_loss_changes_nothing(launcher: Launcher, tmp_path, flags, record, part):
    failures = []
    steps = [(number, step) for number, step in enumerate(spread(2, 13, count(4, 10), "poison")) if number % 2 == part]
    for number, step in steps:
        directory, report = tmp_path / f"poisoned{number}", tmp_path / f"{number}.time"
        loss, rank = number % 4 < 2, number % 2
        poison = (
            "at",
            {
                "event": "training",
                "n": step,
                "report": str(report),
                "action": "poison_loss" if loss else "poison_gradient",
                "value": float("nan") if number % 3 else float("inf"),
            },
        )
        faults = [[("trace_updates", {"path": str(tmp_path / f"{number}.{r}.trace")})] for r in range(2)]
        faults[rank].append(poison)
        job = launcher.train_each(directory, faults, *flags, "--batch-size", "4", "--checkpoint-steps", "1")
        codes, seconds = ended_after(job, report)
        told = "".join(child.err for child in job)
        label = f"{'loss' if loss else 'gradient'} of forward {step} on rank {rank}"
        if codes != [4, 4] or seconds > DEATH_LIMIT:
            failures.append(f"{label}: exit {codes} after {seconds:.1f} s: {told[-700:]}")
            continue
        if not one_line(told) or not all(word in told for word in ("step", "lr", ".png")):
            failures.append(f"{label}: said {told!r}")
        # The parameters after the last update of each rank are what the last checkpoint holds, bit for bit.
        state = read_checkpoint(directory / "checkpoint_last.pth")
        notes = [traced(tmp_path / f"{number}.{r}.trace") for r in range(2)]
        last = [[note for note in own if note["kind"] == "updated"][-1] for own in notes]
        if [own[-1]["kind"] for own in notes] != ["refused"] * 2:
            failures.append(f"{label}: {[own[-1] for own in notes]}")
        elif len({note["parameters"] for note in [*last, *(own[-1] for own in notes)]}) != 1:
            failures.append(f"{label}: parameters changed")
        if state["updates"] != step - 1:
            failures.append(f"{label}: the last checkpoint is of update {state['updates']}")
    record(
        "losses and gradients made NaN or infinite on one of two ranks: 0 parameters changed, both exit 4 "
        "in 10 s, last checkpoint intact, step, lr and files named",
        len(steps),
        failures,
    )


# (processes, loader workers, what dies, rank, in training or evaluation): ten in a full run.
DEATHS = [
    (1, 2, "worker", 0, "training"),
    (2, 0, "rank", 1, "training"),
    (2, 2, "rank", 0, "training"),
    (2, 2, "rank", 1, "training"),
    (2, 2, "worker", 1, "training"),
    (1, 2, "worker", 0, "evaluation"),
    (2, 0, "rank", 0, "evaluation"),
    (3, 1, "rank", 2, "training"),
    (3, 1, "worker", 0, "training"),
    (2, 2, "rank", 1, "evaluation"),
]


@pytest.mark.promise(14)
@pytest.mark.parametrize("part", [0, 1])
def test_a_dead_worker_or_rank_ends_the_run(launcher: Launcher, tmp_path, flags, record, part):
    cases = DEATHS[: count(4, len(DEATHS))][part::2]
    failures, slowest = [], 0.0
    for number, (world, workers, victim, rank, event) in enumerate(cases):
        report = tmp_path / f"{number}.time"
        death = (
            "at",
            {
                "event": event,
                "n": 2,
                "report": str(report),
                "action": "kill_worker" if victim == "worker" else "kill_self",
            },
        )
        children = launcher.train(
            tmp_path / f"run{number}",
            *flags,
            "--batch-size",
            "2",
            world=world,
            workers=workers,
            faults=[death],
            faulty_rank=rank,
        )
        codes, seconds = ended_after(children, report)
        slowest = max(slowest, seconds)
        label = f"{victim} of rank {rank} of {world}, {workers} workers, in {event}"
        left = [pid for child in children for pid in child.left_behind()]
        if 0 in codes or seconds > DEATH_LIMIT or left:
            told = "".join(child.err for child in children)
            failures.append(f"{label}: exit {codes} after {seconds:.1f} s, left {left}: {told[-500:]}")
    record(
        "deaths by SIGKILL that ended every process with a code other than 0 in 10 s, 0 orphans",
        len(cases),
        failures,
        worst=slowest,
    )


# Seconds for fresh interpreters to import torch and train: much more than it takes, and less than a CI job.
LAUNCH = 600


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if alive(child)]


@pytest.mark.promise(14)
def test_torchrun_restarts_a_job_that_lost_a_rank(launcher: Launcher, tmp_path, flags, record):
    """The real launcher and fresh interpreters; `--max-restarts` and `--resume auto` make the same result."""
    argv = [*TINY, *flags, "--batch-size", "4", "--checkpoint-steps", "1", "--resume", "auto"]
    launcher.complete(tmp_path / "reference", *argv, base=[], world=2)
    directory = tmp_path / "elastic"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "2",
        "main_spectformer.py",
        *argv,
        "--num-workers",
        "0",
        "--epochs",
        "3",
        "--output-dir",
        str(directory),
    ]
    with open(tmp_path / "torchrun.txt", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + LAUNCH
        while not (directory / "checkpoint_last.pth").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        ranks = [child for child in descendants(process) if "main_spectformer.py" in child.cmdline()]
        ranks[-1].send_signal(signal.SIGKILL)
        family = descendants(process)
        code = process.wait(LAUNCH)
    finally:
        for child in [*descendants(process), process] if process.poll() is None else []:
            child.kill()
    told = (tmp_path / "torchrun.txt").read_text()
    failures = []
    if code != 0 or "going on from" not in told:
        failures.append(f"exit {code}: {told[-3000:]}")
    elif differences(outcome(directory), outcome(tmp_path / "reference")):
        failures.append(f"{differences(outcome(directory), outcome(tmp_path / 'reference'))} differ")
    if [pid for pid in family if alive(pid)]:
        failures.append("processes are left")
    record(
        "lost ranks after which torchrun restarted the group and the run ended as the uninterrupted one",
        1,
        failures,
    )


@pytest.mark.promise(14)
def test_another_number_of_processes_keeps_the_global_batch_or_says_why_not(launcher, tmp_path, flags, record):
    stop = ("at", {"event": "updated", "n": 2, "action": "send", "signum": signal.SIGTERM})
    for child in launcher.train(tmp_path / "run", *flags, "--batch-size", "4", world=2, faults=[stop], faulty_rank=0):
        assert child.wait() == 128 + signal.SIGTERM
    before = file_digest(tmp_path / "run" / "checkpoint_last.pth")
    failures = []
    refused = launcher.train(tmp_path / "run", *flags, "--batch-size", "4", "--resume", "auto", world=3)
    codes = [child.wait() for child in refused]
    told = "".join(child.err for child in refused)
    if codes != [2, 2, 2] or not one_line(told) or "3 processes" not in told:
        failures.append(f"3 processes: exit {codes}, said {told!r}")
    if file_digest(tmp_path / "run" / "checkpoint_last.pth") != before:
        failures.append("3 processes: the checkpoint changed")
    (child,) = launcher.complete(tmp_path / "run", *flags, "--batch-size", "4", "--resume", "auto")
    state = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")
    if state["updates"] != 12 or [row["samples_seen"] for row in rows(tmp_path / "run")] != [32, 64, 96]:
        failures.append(f"1 process: {state['updates']} updates, {rows(tmp_path / 'run')}")
    record("changes of the number of processes that kept the images an update, or said why not", 2, failures)
