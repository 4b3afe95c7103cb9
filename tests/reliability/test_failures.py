"""Promises 7 and 12: losses that are not finite, workers and ranks that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from coco_example import write_example
from harness import ROOT, TINY, TINY_DETECTION, alive, count, differences, digest, one_line, outcome

from models.checkpoints import read_checkpoint

# (processes, loader workers, what dies, rank, in training or evaluation)
DEATHS = [
    (1, 2, "worker", 0, "training"),
    (2, 2, "rank", 0, "training"),
    (2, 1, "rank", 1, "evaluation"),
    (2, 2, "worker", 1, "training"),
    (3, 1, "rank", 2, "training"),
    (1, 2, "worker", 0, "evaluation"),
]


@pytest.mark.promise(7)
@pytest.mark.parametrize("action", ["poison_loss", "poison_gradient"])
def test_a_loss_that_is_not_finite_changes_nothing_and_every_rank_names_it(launcher, tmp_path, flags, action):
    for step in (3, 6, 11)[: count(1, 3)]:
        directory, rank = tmp_path / f"{step}", step % 2
        poison = ("at", {"event": "training", "n": step, "action": action, "value": float("nan")})
        how = {"world": 2, "faults": [poison], "faulty_rank": rank}
        job = launcher.train(directory, *flags, "--batch-size", "4", "--checkpoint-steps", "1", **how)
        for child in job:
            assert child.wait() == 4 and one_line(child.err), child.err
            assert f"step {(step - 1) % 4}" in child.err and "no weight was changed" in child.err
            assert child.err.count(".png") == 8  # of both ranks
        state = read_checkpoint(directory / "checkpoint_last.pth")
        assert state["updates"] == step - 1
        stop = ("at", {"event": "updated", "n": step - 2, "action": "send", "signum": signal.SIGTERM})
        stopped = launcher.train(tmp_path / f"to{step}", *flags, "--batch-size", "4", world=2, faults=[stop])
        assert [child.wait() for child in stopped] == [143, 143]
        reference = read_checkpoint(tmp_path / f"to{step}" / "checkpoint_last.pth")
        assert reference["updates"] == step - 1
        assert digest([state["model"], state["optimizer"]]) == digest([reference["model"], reference["optimizer"]])


@pytest.mark.promise(7)
def test_a_detector_whose_loss_is_not_finite_changes_nothing(launcher, tmp_path):
    cells = write_example(tmp_path / "cells", scale=4)
    flags = ["--data-path", str(cells), "--lr", "1e18", "--warmup-lr", "1e18", "--checkpoint-steps", "1"]
    (child,) = launcher.train(tmp_path / "run", *flags, base=TINY_DETECTION, main="main_detection")
    assert child.wait() == 4 and "no weight was changed" in child.err and ".png" in child.err, child.err


@pytest.mark.promise(12)
@pytest.mark.parametrize("death", DEATHS[: count(2, len(DEATHS))], ids=str)
def test_a_dead_worker_or_rank_ends_the_run_and_leaves_no_process(launcher, tmp_path, flags, death):
    world, workers, victim, rank, event = death
    action = "kill_worker" if victim == "worker" else "kill_self"
    how = {"world": world, "workers": workers, "faulty_rank": rank}
    fault = ("at", {"event": event, "n": 2, "action": action})
    children = launcher.train(tmp_path / "run", *flags, "--batch-size", "2", faults=[fault], **how)
    assert all(child.wait(60) != 0 for child in children)
    deadline = time.monotonic() + 60
    while (left := [pid for child in children for pid in child.left_behind()]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


def descendants(process: subprocess.Popen) -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if alive(child)]


@pytest.mark.promise(12)
@pytest.mark.parametrize("restarts", [0, 1][: count(1, 2)])
def test_torchrun_ends_or_restarts_a_job_that_lost_a_rank(launcher, tmp_path, flags, restarts):
    """The real launcher and fresh interpreters; with restarts and `--resume auto` the result is the same."""
    argv = [*TINY, *flags, "--batch-size", "4", "--checkpoint-steps", "1", "--resume", "auto"]
    directory = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["--max-restarts", str(restarts), "main_spectformer.py"]
    with open(tmp_path / "torchrun.txt", "w") as log:
        command = [*launch, *argv, "--num-workers", "1", "--output-dir", str(directory)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        while not (directory / "checkpoint_last.pth").exists() and process.poll() is None:
            time.sleep(0.02)
        ranks = [child for child in descendants(process) if "main_spectformer.py" in child.cmdline()]
        family = descendants(process)
        ranks[-1].send_signal(signal.SIGKILL)
        code = process.wait(300)
    finally:
        for child in [*descendants(process), process] if process.poll() is None else []:
            child.kill()
    said = (tmp_path / "torchrun.txt").read_text()
    assert (code == 0) == bool(restarts), said[-3000:]
    deadline = time.monotonic() + 60
    while (left := [child for child in family if alive(child)]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    if restarts:
        launcher.complete(tmp_path / "reference", *argv, base=[], world=2)
        assert "resuming from" in said and not differences(outcome(directory), outcome(tmp_path / "reference"))
