"""Row 20: processes of one job that were started differently do not train."""

from __future__ import annotations

import pytest
from harness import DEATH_LIMIT, Launcher, count, one_line

# What the second process is given beside the first's flags, and what the line has to name.
DIFFERENT = [
    (["--seed", "5"], "seed"),
    (["--lr", "0.1"], "lr"),
    (["--epochs", "7"], "epochs"),
    (["--batch-size", "4"], "batch-size"),
    (["--accum-iter", "2"], "accum-iter"),
    (["--no-model-ema"], "model-ema"),
    (["--model-ema-decay", "0.5"], "model-ema-decay"),
    (["--opt", "sgd"], "opt"),
    (["--clip-grad", "7"], "clip-grad"),
    (["--aa", "none"], "aa"),
    (["--smoothing", "0"], "smoothing"),
    (["--checkpoint-steps", "1"], "checkpoint-steps"),
    (["--drop-path", "0"], "drop-path"),
    (["--dry-run"], "dry-run"),
    (["--classes", "class0,class1,class2"], "classes"),
    (["--num-workers", "1"], "num-workers"),
]


@pytest.mark.promise(20)
def test_processes_with_different_flags_do_not_train(launcher: Launcher, tmp_path, flags, record):
    cases = DIFFERENT[:: len(DIFFERENT) // count(2, len(DIFFERENT))]
    failures = []
    for number, (other, named) in enumerate(cases):
        directory = tmp_path / f"run{number}"
        children = launcher.train(directory, *flags, world=2, second=other)
        codes, told = [child.wait(6 * DEATH_LIMIT) for child in children], "".join(child.err for child in children)
        if codes != [2, 2] or not one_line(told) or f" {named}" not in told:
            failures.append(f"{other}: exit {codes}, said {told[-500:]!r}")
        if directory.exists():
            failures.append(f"{other}: left {list(directory.iterdir())}")
    record("flags of which one process had another: both exit 2 in one line that names it", len(cases), failures)
