"""Rows 3 and 11: neither workers nor processes change which sample comes when, or how often."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from harness import TINY, Launcher, count, free_port

from models.checkpoints import read_checkpoint


@pytest.mark.promise(3)
@pytest.mark.parametrize("repeated", [False, True], ids=["each once", "repeated"])
def test_order_and_augmentation_do_not_depend_on_workers_or_processes(launcher, tmp_path, flags, record, repeated):
    report = tmp_path / "traces.json"
    argv = [
        *TINY,
        *flags,
        "--aa",
        "rand-m9-mstd0.5-inc1",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        *(["--repeated-aug"] if repeated else []),
    ]
    child = launcher.start("children:order_traces", argv=argv, images=12, epochs=[0, 1], report=str(report))
    assert child.wait() == 0, child.err
    traces = json.loads(report.read_text())
    expected = traces["0 1"]
    assert len({image for _, image in expected}) > 0.9 * len(expected), "the augmentation does not vary"
    wrong = [
        f"workers and processes {name}: other samples or pixels" for name, trace in traces.items() if trace != expected
    ]
    record(
        "numbers of workers and processes with the same samples in the same order, pixel for pixel",
        len(traces),
        wrong,
    )


@pytest.mark.promise(3)
def test_weights_do_not_depend_on_the_number_of_processes(launcher: Launcher, tmp_path, flags, record):
    exact = [
        *flags,
        "--dtype",
        "float64",
        "--mixup",
        "0",
        "--cutmix",
        "0",
        "--drop-path",
        "0",
        "--resume",
        "auto",
    ]
    launcher.complete(tmp_path / "alone", *exact)
    for world, last in ((1, 3), (2, 4)):
        stop = ("at", {"event": "updated", "n": last, "action": "send", "signum": signal.SIGTERM})
        for child in launcher.train(tmp_path / "changing", *exact, world=world, faults=[stop], faulty_rank=0):
            assert child.wait() == 128 + signal.SIGTERM, child.err
    launcher.complete(tmp_path / "changing", *exact)
    alone, changing = (
        read_checkpoint(tmp_path / name / "checkpoint_last.pth")["model"] for name in ("alone", "changing")
    )
    apart = {name: (weight - changing[name]).abs().max().item() for name, weight in alone.items()}
    assert all(weight.dtype == torch.float64 for weight in alone.values())
    record(
        "tensors of float64 weights the same after 1, 2 and 1 processes as after 1",
        len(apart),
        [f"{name}: {value}" for name, value in apart.items() if not value <= 1e-10],
        worst=max(apart.values()),
    )


@pytest.mark.promise(11)
def test_evaluation_counts_every_image_once(launcher: Launcher, tmp_path: Path, record):
    sizes, batches = list(range(1, 68, count(6, 1))), [1, 3, 8, 16]
    counts = {}
    for world in range(1, 5):
        report, port = tmp_path / f"{world}.json", str(free_port())
        children = [
            launcher.start(
                "children:evaluate_sizes",
                sizes=sizes,
                batches=batches,
                report=str(report),
                environment={
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                },
            )
            for rank in range(world)
        ]
        for child in children:
            assert child.wait(600) == 0, child.err
        counts[world] = json.loads(report.read_text())
    wrong, total = [], 0
    for size in sizes:
        expected = [*counts[1][f"{size} 1"][:2], size]
        for world in counts:
            for batch in batches:
                total += 1
                got = counts[world][f"{size} {batch}"]
                if got != expected:
                    wrong.append(f"{size} images, {world} processes, batches of {batch}: {got}, not {expected}")
    assert len({tuple(value) for value in counts[1].values()}) > len(sizes) / 2, "the counts say nothing"
    record("sizes, processes and batches with the same whole numbers of right answers and images", total, wrong)
