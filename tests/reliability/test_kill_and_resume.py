"""Promises 1 to 3: a run that is killed or stopped resumes as if nothing had happened."""

from __future__ import annotations

import signal

import pytest
from coco_example import write_example
from harness import TINY_DETECTION, count, differences, one_line, outcome, rows, spread, temporaries, traced

from models.checkpoints import read_checkpoint

# (processes, loader workers) -> kill points anywhere and inside a save
KILL_POINTS = {(1, 0): (count(2, 20), count(1, 10)), (2, 2): (count(1, 12), count(0, 8))}
# (signal, processes, rank that gets it, event, its number, times)
SIGNALS = [
    (signal.SIGTERM, 1, 0, "save", 2, 2),
    (signal.SIGINT, 2, 1, "updated", 5, 1),
    (signal.SIGUSR1, 2, 0, "evaluation", 2, 1),
    (signal.SIGTERM, 2, 0, "updated", 4, 1),
    (signal.SIGINT, 1, 0, "training", 4, 1),
    (signal.SIGUSR1, 1, 0, "save", 3, 1),
    (signal.SIGINT, 1, 0, "evaluation", 1, 2),
    (signal.SIGTERM, 2, 1, "training", 7, 2),
]


def killed_and_resumed(launcher, directory, flags, fault, victim, **how):
    """Kill a rank, and the rest of its job with it, then let the run finish; whether it died of the fault."""
    children = launcher.train(directory, *flags, faults=[fault], faulty_rank=victim, **how)
    code = children[victim].wait()
    for child in children:
        child.kill()
    launcher.complete(directory, *flags, **how)
    return code == -signal.SIGKILL


def check_kills(launcher, tmp_path, flags, points, **how):
    """Kill a run at so many points anywhere and inside a save; the outcome has to be the uninterrupted run's."""
    lengths, world = {}, how["world"]
    for scope, directory in (("run", "reference"), ("save", "second")):
        measuring = [("kill_anywhere", {"scope": scope, "report": str(tmp_path / scope)})]
        launcher.complete(tmp_path / directory, *flags, faults=measuring, faulty_rank=0, **how)
        lengths[scope] = int((tmp_path / scope).read_text())
    expected = outcome(tmp_path / "reference")
    assert not differences(outcome(tmp_path / "second"), expected), "two uninterrupted runs differ"
    places = [(scope, n) for scope, number in points.items() for n in spread(1, lengths[scope], number, scope, world)]
    killed = 0
    for number, (scope, n) in enumerate(places):
        directory = tmp_path / f"killed{number}"
        victim = number % world if scope == "run" else 0  # the main process saves
        fault = ("kill_anywhere", {"scope": scope, "n": n})
        killed += killed_and_resumed(launcher, directory, flags, fault, victim, **how)
        label = f"{scope} call {n} of {lengths[scope]} on rank {victim} of {world}"
        assert not differences(outcome(directory), expected), label
        assert [row["epoch"] for row in rows(directory)] == [row["epoch"] for row in rows(tmp_path / "reference")], (
            label
        )
        assert not temporaries(directory), label
    assert killed >= 0.8 * len(places), "the runs ended before they were killed"


@pytest.mark.promise(1)
@pytest.mark.parametrize(("world", "workers"), KILL_POINTS)
def test_a_killed_run_resumes_to_the_same_bits(launcher, tmp_path, flags, world, workers):
    anywhere, inside = KILL_POINTS[world, workers]
    flags = [*flags, "--batch-size", str(8 // world), "--checkpoint-steps", "3", "--resume", "auto"]
    check_kills(launcher, tmp_path, flags, {"run": anywhere, "save": inside}, world=world, workers=workers)


@pytest.mark.promise(1)
def test_a_killed_detection_run_resumes_to_the_same_bits(launcher, tmp_path):
    cells = write_example(tmp_path / "cells", scale=4)
    flags = ["--data-path", str(cells), "--batch-size", "1", "--checkpoint-steps", "1", "--resume", "auto"]
    how = {"base": TINY_DETECTION, "main": "main_detection", "world": 2, "workers": 1}
    check_kills(launcher, tmp_path, flags, {"run": count(1, 6)}, **how)


@pytest.mark.promise(2)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_within_an_epoch_trains_on_each_sample_once(launcher, tmp_path, flags, trained, workers):
    for step in spread(1, 12, count(1, 11), "reads", workers):
        trace, directory = tmp_path / f"{step}.trace", tmp_path / f"stopped{step}"
        tracing = ("trace_reads", {"path": str(trace)})
        stop = ("at", {"event": "updated", "n": step, "action": "send", "signum": signal.SIGTERM})
        (child,) = launcher.train(directory, *flags, workers=workers, faults=[tracing, stop])
        assert child.wait() == 128 + signal.SIGTERM, child.err
        launcher.complete(directory, *flags, "--resume", "auto", workers=workers, faults=[tracing])
        batches = [entry for entry in traced(trace) if entry["kind"] == "batch"]
        assert [(entry["epoch"], entry["step"]) for entry in batches] == [(e, s) for e in range(3) for s in range(4)]
        for epoch in range(3):
            used = [index for entry in batches if entry["epoch"] == epoch for index in entry["indices"]]
            assert sorted(used) == list(range(32))
        assert not differences(outcome(directory), outcome(trained))


@pytest.mark.promise(3)
@pytest.mark.parametrize("case", SIGNALS[: count(3, len(SIGNALS))], ids=str)
def test_a_signal_saves_and_exits_with_its_number(launcher, tmp_path, flags, case):
    signum, world, rank, event, n, times = case
    flags = [*flags, "--checkpoint-steps", "2", "--batch-size", str(8 // world), "--resume", "auto"]
    send = ("at", {"event": event, "n": n, "action": "send", "signum": signum, "times": times})
    children = launcher.train(tmp_path / "run", *flags, world=world, workers=1, faults=[send], faulty_rank=rank)
    assert [child.wait() for child in children] == [128 + signum] * world, children[0].err
    for child in children:
        # The main process answers at once if it is the one that was signalled.
        announced = "finishing this step, then saving\n"
        assert (announced in child.err) == (rank == 0 == children.index(child))
        assert child.err.replace(announced, "").strip() == f"error: stopped by {signal.Signals(signum).name}"
    state = read_checkpoint(tmp_path / "run" / "checkpoint_last.pth")
    assert state["updates"] >= (n if event in ("updated", "training") else 1)
    launcher.complete(tmp_path / "run", *flags, world=world, workers=1)
    launcher.complete(tmp_path / "whole", *flags, world=world, workers=1)
    assert not differences(outcome(tmp_path / "run"), outcome(tmp_path / "whole"))


@pytest.mark.promise(2)
def test_another_number_of_processes_continues_with_the_same_images_per_update(launcher, tmp_path, flags):
    stop = ("at", {"event": "updated", "n": 2, "action": "send", "signum": signal.SIGTERM})
    run = tmp_path / "run"
    for child in launcher.train(run, *flags, "--batch-size", "4", world=2, faults=[stop], faulty_rank=0):
        assert child.wait() == 128 + signal.SIGTERM
    before = (run / "checkpoint_last.pth").read_bytes()
    for child in launcher.train(run, *flags, "--batch-size", "4", "--resume", "auto", world=3):
        assert child.wait() == 2 and one_line(child.err) and "3 processes" in child.err
    assert (run / "checkpoint_last.pth").read_bytes() == before
    launcher.complete(run, *flags, "--batch-size", "4", "--resume", "auto")
    assert read_checkpoint(run / "checkpoint_last.pth")["updates"] == 12
    assert [row["samples_seen"] for row in rows(run)] == [32, 64, 96]
