"""Rows 1, 2 and 4: a run that is killed or stopped goes on as if nothing had happened."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import (
    FULL,
    Launcher,
    count,
    differences,
    outcome,
    rows,
    spread,
    temporaries,
    traced,
)

# (processes, loader workers) -> kill points anywhere and inside a save, in a reduced and in a full run
KILL_POINTS = {
    (1, 0): (count(2, 10), count(1, 6)),
    (1, 2): (count(1, 8), count(1, 6)),
    (2, 0): (count(1, 6), count(1, 4)),
    (2, 2): (count(1, 6), count(0, 4)),
}


def kill(children: list) -> None:
    for child in children:
        child.kill()
        child.wait()


def continuous(got: list[dict], expected: list[dict]) -> list[str]:
    """What differs between the updates of two runs, of which the first may have made some twice."""
    wanted = {(entry["kind"], str(entry["key"])): entry for entry in expected}
    wrong = [
        f"{entry['kind']} {entry['key']}" for entry in got if wanted.get((entry["kind"], str(entry["key"]))) != entry
    ]
    missing = wanted.keys() - {(entry["kind"], str(entry["key"])) for entry in got}
    return wrong + [f"never made: {key}" for key in missing]


@pytest.mark.promise(1)
@pytest.mark.parametrize(("world", "workers"), KILL_POINTS)
def test_a_killed_run_resumes_to_the_same_result(launcher: Launcher, tmp_path: Path, flags, record, world, workers):
    batch = ["--batch-size", str(8 // world), "--checkpoint-steps", "3", "--resume", "auto"]
    lengths = {}
    for scope in ("run", "save"):
        report = tmp_path / f"{scope}.count"
        launcher.complete(
            tmp_path / "reference" if scope == "run" else tmp_path / "second",
            *flags,
            *batch,
            world=world,
            workers=workers,
            faulty_rank=0,
            faults=[
                ("kill_anywhere", {"scope": scope, "report": str(report)}),
                ("trace_updates", {"path": str(tmp_path / f"{scope}.trace")}),
            ],
        )
        lengths[scope] = int(report.read_text())
    expected = outcome(tmp_path / "reference")
    assert not differences(outcome(tmp_path / "second"), expected), "two uninterrupted runs differ"
    expected_updates = traced(tmp_path / "run.trace")

    failures, killed = [], 0
    anywhere, inside = KILL_POINTS[world, workers]
    points = [("run", n) for n in spread(1, lengths["run"], anywhere, "run", world, workers)]
    points += [("save", n) for n in spread(1, lengths["save"], inside, "save", world, workers)]
    for number, (scope, n) in enumerate(points):
        directory = tmp_path / f"killed{number}"
        trace = ("trace_updates", {"path": str(tmp_path / f"{number}.trace")})
        victim = number % world if scope == "run" else 0  # the main process saves
        children = launcher.train(
            directory,
            *flags,
            *batch,
            world=world,
            workers=workers,
            faulty_rank=victim,
            faults=[("kill_anywhere", {"scope": scope, "n": n}), trace],
        )
        code = children[victim].wait()
        kill(children)
        killed += code == -signal.SIGKILL
        launcher.complete(directory, *flags, *batch, world=world, workers=workers, faults=[trace], faulty_rank=victim)
        label = f"{scope} call {n} of {lengths[scope]} on rank {victim} of {world}, {workers} workers"
        if wrong := differences(outcome(directory), expected):
            failures.append(f"{label}: {wrong} differ")
        elif [row["epoch"] for row in rows(directory)] != [0, 1, 2]:
            failures.append(f"{label}: log rows {[row['epoch'] for row in rows(directory)]}")
        elif victim == 0 and (wrong := continuous(traced(tmp_path / f"{number}.trace"), expected_updates)):
            failures.append(f"{label}: {wrong[:3]}")
        elif left := temporaries(directory):
            failures.append(f"{label}: {left} left")
    assert killed >= 0.8 * len(points), f"only {killed} of {len(points)} runs were killed before their end"
    record(
        "kill points after which model, optimiser, EMA, random states and log are the uninterrupted run's",
        len(points),
        failures,
    )


def stop_and_go(
    launcher: Launcher, directory: Path, flags: list[str], step: int, trace: str, path: Path, workers: int
) -> None:
    """Stop a run by SIGTERM after an update, then let it finish; both append to one trace."""
    tracing = (trace, {"path": str(path)})
    stop = ("at", {"event": "updated", "n": step, "action": "send", "signum": signal.SIGTERM})
    (child,) = launcher.train(directory, *flags, workers=workers, faults=[tracing, stop])
    assert child.wait() == 128 + signal.SIGTERM, child.err
    launcher.complete(directory, *flags, "--resume", "auto", workers=workers, faults=[tracing])


@pytest.mark.promise(2)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_resumed_in_an_epoch_reads_no_sample_twice(launcher, tmp_path, flags, record, workers):
    failures, total = [], 0
    for step in spread(1, 12, count(2, 11), "reads", workers):
        trace = tmp_path / f"{step}.trace"
        stop_and_go(launcher, tmp_path / f"stopped{step}", flags, step, "trace_reads", trace, workers)
        entries = traced(trace)
        batches = [(entry["epoch"], entry["step"]) for entry in entries if entry["kind"] == "batch"]
        used = [(entry["epoch"], index) for entry in entries if entry["kind"] == "batch" for index in entry["indices"]]
        total += len(used)
        if batches != [(epoch, step) for epoch in range(3) for step in range(4)]:
            failures.append(f"stopped after update {step}: steps {batches}")
        failures += [f"stopped after update {step}: {key} twice" for key in set(used) if used.count(key) > 1]
        # Without workers nothing is read ahead, so every file was opened once an epoch.
        read = [
            (entry["epoch"], entry["index"])
            for entry in entries
            if entry["kind"] == "read" and "/train/" in entry["path"]
        ]
        if workers == 0 and sorted(read) != sorted(used):
            failures.append(f"stopped after update {step}: {len(read)} reads for {len(used)} samples")
    record("samples of stopped and resumed epochs that were trained on exactly once", total, failures)


@pytest.mark.promise(4)
def test_rates_average_and_best_accuracy_continue(launcher, tmp_path, flags, record):
    reference = tmp_path / "reference"
    launcher.complete(reference, *flags, faults=[("trace_updates", {"path": str(tmp_path / "reference.trace")})])
    expected = traced(tmp_path / "reference.trace")
    failures = []
    boundaries = range(1, 13) if FULL else (2, 4, 9)
    for step in boundaries:
        trace = tmp_path / f"{step}.trace"
        stop_and_go(launcher, tmp_path / f"stopped{step}", flags, step, "trace_updates", trace, 0)
        got = traced(trace)
        failures += [f"resumed after update {step}: {what}" for what in continuous(got, expected)]
        if len(got) != len(expected):
            failures.append(f"resumed after update {step}: {len(got)} instead of {len(expected)} notes of updates")
        failures += [
            f"resumed after update {step}: {name}"
            for name in differences(outcome(tmp_path / f"stopped{step}"), outcome(reference))
        ]
    record(
        "resume boundaries after which lr, weight decay, EMA, weights and best accuracy are the same",
        len(boundaries),
        failures,
    )
