"""Row 18: a run that went back to an earlier checkpoint is the one that `--resume auto` goes on with."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Launcher, copy_run, count, differences, file_digest, outcome, rows, spread, temporaries


def kept(directory: Path) -> set[str]:
    """The digests of a directory's checkpoints, those set aside among them."""
    return {file_digest(path) for path in directory.rglob("checkpoint*.pth")}


@pytest.mark.promise(18)
def test_a_branch_killed_anywhere_goes_on_and_the_old_one_is_kept(launcher: Launcher, tmp_path, flags, trained, record):
    other = [*flags, "--lr", "1e-3", "--checkpoint-epochs", "1"]

    def back(directory: Path) -> list[str]:
        return [*other, "--resume", str(directory / "checkpoint_0001.pth")]

    reference, report = copy_run(trained, tmp_path / "reference"), tmp_path / "count"
    counting = ("kill_anywhere", {"scope": "run", "report": str(report)})
    launcher.complete(reference, *back(reference), faults=[counting])
    branch, old = outcome(reference), outcome(trained)
    assert differences(branch, old), "the branch is no other run"

    points = spread(1, int(report.read_text()), count(3, 20), "branches")
    failures, killed = [], 0
    for number, point in enumerate(points):
        directory = copy_run(trained, tmp_path / f"killed{number}")
        (child,) = launcher.train(directory, *back(directory), faults=[("kill_anywhere", {"scope": "run", "n": point})])
        killed += child.wait() < 0
        launcher.complete(directory, *other, "--resume", "auto")
        if not differences(outcome(directory), old):  # killed before there was a branch: nothing has changed
            launcher.complete(directory, *back(directory))
        failures += [f"killed at call {point}: {name}" for name in differences(outcome(directory), branch)]
        failures += [f"killed at call {point}: {name} left" for name in temporaries(directory)]
        if kept(trained) - kept(directory):
            failures.append(f"killed at call {point}: checkpoints of the old branch are lost")
        if [row["epoch"] for row in rows(directory)] != [0, 1, 2]:
            failures.append(f"killed at call {point}: the rows are {rows(directory)}")
    assert killed, "no run was killed before its end"
    record(
        "kill -9 anywhere on a branch: auto ended it as if uninterrupted, and the old one was kept",
        len(points),
        failures,
    )
