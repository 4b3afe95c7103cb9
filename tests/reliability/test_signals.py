"""Row 5: a stop signal saves everything and leaves with 128 + its number."""

from __future__ import annotations

import signal

import pytest
from harness import FULL, Launcher, count, differences, farthest, one_line, outcome

from models.checkpoints import read_checkpoint

# (signal, processes, rank that gets it, event, occurrence of it, times): 20 in a full run.
CASES = [
    (signal.SIGTERM, 1, 0, "updated", 1, 1),
    (signal.SIGINT, 2, 1, "updated", 5, 1),
    (signal.SIGUSR1, 2, 1, "evaluation", 2, 1),
    (signal.SIGTERM, 1, 0, "save", 2, 2),
    (signal.SIGUSR1, 1, 0, "update", 6, 2),
    (signal.SIGTERM, 2, 0, "evaluation", 3, 1),
    (signal.SIGINT, 1, 0, "training", 4, 1),
    (signal.SIGINT, 1, 0, "evaluation", 1, 2),
    (signal.SIGUSR1, 1, 0, "save", 3, 1),
    (signal.SIGTERM, 2, 1, "updated", 4, 1),
    (signal.SIGINT, 2, 0, "save", 1, 2),
    (signal.SIGUSR1, 2, 0, "updated", 8, 1),
    (signal.SIGTERM, 1, 0, "updated", 11, 1),
    (signal.SIGINT, 3, 2, "updated", 3, 1),
    (signal.SIGUSR1, 3, 1, "evaluation", 2, 1),
    (signal.SIGTERM, 3, 0, "training", 7, 2),
    (signal.SIGINT, 1, 0, "updated", 9, 1),
    (signal.SIGUSR1, 2, 1, "training", 10, 1),
    (signal.SIGTERM, 1, 0, "evaluation", 6, 1),
    (signal.SIGINT, 2, 1, "update", 2, 2),
]


@pytest.mark.promise(5)
@pytest.mark.parametrize("part", [0, 1])
def test_a_signal_saves_and_leaves(launcher: Launcher, tmp_path, flags, record, part):
    # Six images an update, which one, two and three processes can make.
    flags = [*flags, "--checkpoint-steps", "2", "--mixup", "0", "--cutmix", "0"]
    cases = CASES[: count(6, len(CASES))][part::2]
    failures, expected = [], {}
    for number, (signum, world, rank, event, n, times) in enumerate(cases):
        batch = ["--batch-size", str(6 // world)]
        if FULL and world not in expected:
            launcher.complete(tmp_path / f"reference{world}", *flags, *batch, world=world, workers=1)
            expected[world] = outcome(tmp_path / f"reference{world}")
        directory = tmp_path / f"stopped{number}"
        label = f"{signal.Signals(signum).name} x {times} to rank {rank} of {world}, {event} {n}"
        send = ("at", {"event": event, "n": n, "action": "send", "signum": signum, "times": times})
        children = launcher.train(directory, *flags, *batch, world=world, workers=1, faults=[send], faulty_rank=rank)
        codes = [child.wait() for child in children]
        told = "".join(child.err for child in children)
        if codes != [128 + signum] * world:
            failures.append(f"{label}: exit {codes}: {told[-500:]}")
            continue
        announced = "finishing this step, then saving\n"  # at once, by the main process if it was signalled
        if told.count(announced) != (rank == 0) or not one_line(told.replace(announced, "")):
            failures.append(f"{label}: said {told!r}")
        state = read_checkpoint(directory / "checkpoint_last.pth")
        done = state["updates"]
        least = {"updated": n, "update": n, "training": n}.get(event, 1)
        if done < least or done > 15:
            failures.append(f"{label}: saved after {done} updates")
        launcher.complete(directory, *flags, *batch, "--resume", "auto", world=world, workers=1)
        if not FULL:
            continue
        # DDP arranges its gradient buckets anew after the first step. With three processes and more that
        # changes the order of a sum, and so its last bits.
        if world == 3 and (distance := farthest(directory, tmp_path / "reference3")) > 1e-5:
            failures.append(f"{label}: weights differ by {distance} after resuming")
        if world < 3 and (wrong := differences(outcome(directory), expected[world])):
            failures.append(f"{label}: {wrong} differ after resuming")
    record(
        "signals after which every rank saved, left with 128 + n in one line, and the run went on",
        len(cases),
        failures,
    )
