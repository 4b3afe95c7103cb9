"""Row 17: a run directory has one run at a time, and none that died keeps it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from harness import HANG, Launcher, count, file_digest, one_line, rows


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + HANG
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)


@pytest.mark.promise(17)
def test_a_second_run_is_refused_and_a_dead_one_keeps_nothing(launcher: Launcher, tmp_path, flags, record):
    failures, total = [], count(3, 10)
    for number in range(total):
        directory, held = tmp_path / f"run{number}", tmp_path / f"{number}.held"
        world, workers = 1 + number % 2, number % 3
        batch = ["--batch-size", str(4 // world), "--checkpoint-steps", "1", "--resume", "auto"]
        pause = ("at", {"event": "training", "n": 2 + number, "action": "pause", "report": str(held)})
        first = launcher.train(directory, *flags, *batch, world=world, workers=workers, faults=[pause], faulty_rank=0)
        wait_for(held)
        before = {path.name: file_digest(path) for path in directory.glob("*.*")}
        second = launcher.train(directory, *flags, *batch, world=world, workers=workers)
        codes, told = [child.wait() for child in second], "".join(child.err for child in second)
        label = f"{world} processes with {workers} workers"
        if codes != [2] * world or not one_line(told) or str(directory) not in told or str(first[0].pid) not in told:
            failures.append(f"{label}: the second run: exit {codes}, said {told!r}")
        if before != {path.name: file_digest(path) for path in directory.glob("*.*")}:
            failures.append(f"{label}: the second run changed a file")
        for child in first:
            child.kill()
        for child in first:
            child.wait()
        # At once: the dead run's workers live on for some seconds.
        third = launcher.train(directory, *flags, *batch, world=world, workers=workers)
        if any(code := child.wait() for child in third):
            failures.append(f"{label}: after kill -9: exit {code}, said {third[0].err[-500:]!r}")
        elif [row["epoch"] for row in rows(directory)] != [0, 1, 2]:
            failures.append(f"{label}: the rows after it are {rows(directory)}")
    record(
        "directories that refused a second run by the holder's number and were free after kill -9",
        total,
        failures,
    )
