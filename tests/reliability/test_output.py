"""Row 19: where a run's words go, to a full disk, nowhere, or to a reader who left, changes nothing of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import Launcher, count, differences, outcome

STREAMS = ([1], [2], [1, 2])
WAYS = ("full", "closed", "left", "leaves")


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if path.is_file()}


@pytest.mark.promise(19)
def test_a_run_that_nobody_listens_to_is_the_same_run(launcher: Launcher, tmp_path, flags, trained, record):
    cases = [(streams, way) for way in WAYS for streams in STREAMS]
    cases = cases[:: len(cases) // count(4, len(cases))]
    failures = []
    for number, (streams, way) in enumerate(cases):
        directory = tmp_path / f"run{number}"
        lost = ("lose_output", {"streams": streams, "way": way})
        (child,) = launcher.train(directory, *flags, "--checkpoint-epochs", "1", "--print-freq", "1", faults=[lost])
        label = f"{way}, of descriptors {streams}"
        if code := child.wait():
            failures.append(f"{label}: exit {code}, {child.err[-500:]}")
        elif files(directory) != files(trained):
            failures.append(f"{label}: the files are {sorted(files(directory))}")
        else:
            failures += [f"{label}: {name} differs" for name in differences(outcome(directory), outcome(trained))]
    record(
        "outputs that were full, closed or left, and a run with the same files and exit code 0", len(cases), failures
    )
