"""Detection keeps the promises that the engine makes for every task: rows 1, 3, 11 and 12 for boxes and masks."""

from __future__ import annotations

from pathlib import Path

import pytest
from coco_example import write_example
from harness import (
    TINY_DETECTION,
    Launcher,
    count,
    differences,
    farthest,
    outcome,
    rows,
    spread,
    temporaries,
)

DETECTION = {"base": TINY_DETECTION, "main": "main_detection"}
# (processes, loader workers) -> kill points, in a reduced and in a full run
KILL_POINTS = {(1, 0): count(2, 6), (2, 1): count(1, 4)}


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_example(tmp_path_factory.mktemp("coco") / "cells", scale=4)


@pytest.mark.promise(1)
@pytest.mark.parametrize(("world", "workers"), KILL_POINTS)
def test_a_killed_detection_run_resumes_to_the_same_result(launcher: Launcher, tmp_path, cells, record, world, workers):
    flags = ["--data-path", str(cells), "--batch-size", str(2 // world), "--checkpoint-steps", "1", "--resume", "auto"]
    report, how = tmp_path / "count", DETECTION | {"world": world, "workers": workers, "faulty_rank": 0}
    measuring = [("kill_anywhere", {"scope": "run", "report": str(report)})]
    launcher.complete(tmp_path / "reference", *flags, faults=measuring, **how)
    expected = outcome(tmp_path / "reference")

    failures, killed = [], 0
    points = spread(1, int(report.read_text()), KILL_POINTS[world, workers], "detection", world, workers)
    for number, point in enumerate(points):
        directory = tmp_path / f"killed{number}"
        children = launcher.train(directory, *flags, faults=[("kill_anywhere", {"scope": "run", "n": point})], **how)
        killed += children[0].wait() < 0
        for child in children:
            child.kill()
            child.wait()
        launcher.complete(directory, *flags, **how)
        failures += [f"killed at call {point}: {name}" for name in differences(outcome(directory), expected)]
        failures += [f"killed at call {point}: {name} left" for name in temporaries(directory)]
    assert killed, "no run was killed before its end"
    record("kill -9 anywhere in the training of a detector", len(points), failures)


@pytest.mark.promise(3)
def test_a_detector_trains_alike_on_one_and_two_processes(launcher: Launcher, tmp_path, cells, record):
    """Every image draws its own anchors and proposals, and losses are means over those of all processes.

    The jitter makes all images of one size: of several sizes, a batch would be padded to the largest.
    """
    frozen = ["--freeze-bn", "--drop-path", "0", "--dtype", "float64", "--large-scale-jitter", "64", "--epochs", "1"]
    flags = ["--data-path", str(cells), *frozen]
    launcher.complete(tmp_path / "one", *flags, "--batch-size", "2", **DETECTION)
    launcher.complete(tmp_path / "two", *flags, "--batch-size", "1", world=2, **DETECTION)
    worst = farthest(tmp_path / "two", tmp_path / "one")
    failures = [] if worst < 1e-5 else [f"weights differ by {worst}"]
    record("weights of a detector after an epoch on two processes and on one", 1, failures, worst)


@pytest.mark.promise(11)
def test_a_detector_is_evaluated_alike_by_any_number_of_processes(launcher: Launcher, tmp_path, cells, record):
    run = tmp_path / "run"
    launcher.complete(run, "--data-path", str(cells), "--epochs", "1", **DETECTION)
    told = [
        row
        for row in rows(run)[-1].items()
        if row[0].startswith(("test_box", "test_mask")) and not row[0].endswith("_ema")
    ]
    assert len(told) > 10
    failures = []
    for world in (1, 3):
        evaluating = ["--data-path", str(cells), "--eval", "--resume", str(run / "checkpoint_last.pth")]
        children = launcher.complete(tmp_path / "unused", *evaluating, world=world, **DETECTION)
        failures += [
            f"{world} processes: {name}" for name, value in told if f'"{name[5:]}": {value}' not in children[0].out
        ]
    record("numbers of a detector's evaluation on one and three processes", 2 * len(told), failures)


@pytest.mark.promise(12)
def test_a_detector_whose_loss_is_not_finite_changes_nothing(launcher: Launcher, tmp_path, cells, record):
    flags = ["--data-path", str(cells), "--lr", "1e18", "--warmup-lr", "1e18", "--checkpoint-steps", "1"]
    (child,) = launcher.train(tmp_path / "run", *flags, **DETECTION)
    code, text = child.wait(), child.err
    failures = (
        [] if code == 4 and "no weight was changed" in text and ".png" in text else [f"exit {code}: {text[-500:]}"]
    )
    record("non-finite losses of a detector", 1, failures)
