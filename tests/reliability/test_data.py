"""Promises 2, 8 and 9: the order of samples, unreadable images, evaluation on any number of processes."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from coco_example import write_example
from harness import TINY_DETECTION, count, differences, farthest, one_line, outcome, rows, traced
from PIL import Image

EXACT = ["--dtype", "float64", "--mixup", "0", "--cutmix", "0", "--drop-path", "0"]


@pytest.mark.promise(2)
def test_weights_do_not_depend_on_the_number_of_processes(launcher, tmp_path, flags):
    exact = [*flags, *EXACT, "--resume", "auto"]
    launcher.complete(tmp_path / "alone", *exact)
    for world, last in ((1, 3), (2, 4)):
        stop = ("at", {"event": "updated", "n": last, "action": "send", "signum": signal.SIGTERM})
        for child in launcher.train(tmp_path / "changing", *exact, world=world, faults=[stop], faulty_rank=0):
            assert child.wait() == 128 + signal.SIGTERM, child.err
    launcher.complete(tmp_path / "changing", *exact)
    assert farthest(tmp_path / "alone", tmp_path / "changing") <= 1e-10


@pytest.mark.promise(9)
def test_a_detector_is_evaluated_alike_on_one_and_two_processes(launcher, tmp_path):
    cells = write_example(tmp_path / "cells", scale=4)
    flags = ["--data-path", str(cells), "--epochs", "1", "--dtype", "float64"]
    how = {"base": TINY_DETECTION, "main": "main_detection"}
    launcher.complete(tmp_path / "run", *flags, **how)
    (row,) = rows(tmp_path / "run")
    flags += ["--eval", "--resume", str(tmp_path / "run" / "checkpoint_last.pth")]
    for world in (1, 2):
        found = json.loads(launcher.complete(tmp_path / "unused", *flags, world=world, **how)[0].out.splitlines()[-1])
        assert {f"test_{name}": value for name, value in found.items()}.items() <= row.items()


def spoiled(images: Path, target: Path, split: str, number: int) -> list[Path]:
    """A copy of the data set with some unreadable images in a split; their paths."""
    shutil.copytree(images, target)
    paths = sorted((target / split).rglob("*.png"))[::2][:number]
    good = io.BytesIO()
    Image.open(paths[0]).convert("RGB").resize((64, 64)).save(good, "JPEG")
    contents = (b"", b"not an image", good.getvalue()[:400], bytes(500))
    for path, content in zip(paths, contents, strict=False):
        path.write_bytes(content)
    return paths


@pytest.mark.promise(8)
@pytest.mark.parametrize(("split", "workers"), [("train", 2), ("val", 0)])
def test_an_unreadable_image_stops_training_and_evaluation_by_name(launcher, tmp_path, images, split, workers):
    (path,) = spoiled(images, tmp_path / "data", split, 1)
    flags = ["--data-set", "FOLDER", "--data-path", str(tmp_path / "data"), "--epochs", "1"]
    (child,) = launcher.train(tmp_path / "run", *flags, workers=workers)
    assert child.wait() == 2 and one_line(child.err) and str(path) in child.err, child.err


@pytest.mark.promise(8)
def test_unreadable_images_are_skipped_and_counted_alike_for_any_number_of_workers(launcher, tmp_path, images):
    bad = spoiled(images, tmp_path / "data", "train", 4)
    flags = ["--data-set", "FOLDER", "--data-path", str(tmp_path / "data"), "--skip-bad-images", "--epochs", "1"]
    files = sorted((tmp_path / "data" / "train").rglob("*.png"))
    for workers in (0, 2):
        tracing = ("trace_reads", {"path": str(tmp_path / f"{workers}.trace")})
        (child,) = launcher.complete(tmp_path / f"{workers}", *flags, workers=workers, faults=[tracing])
        assert f"skipped_images {len(bad)}" in child.out
        assert all(str(path) in child.err for path in bad)
        batches = [entry["indices"] for entry in traced(tmp_path / f"{workers}.trace") if entry["kind"] == "batch"]
        assert not {files[index] for batch in batches for index in batch} & set(bad)
        assert rows(tmp_path / f"{workers}")[0]["skipped_images"] == len(bad)
    assert not differences(outcome(tmp_path / "0"), outcome(tmp_path / "2"))


@pytest.mark.promise(9)
def test_evaluation_counts_every_image_once(launcher, tmp_path):
    sizes, batches = list(range(1, 68, count(13, 1))), [1, 8, 16] if count(0, 1) == 0 else [1, 3, 8, 16]
    counts = {}
    for world in range(1, count(3, 4) + 1):
        report = tmp_path / f"{world}.json"
        arguments = {"sizes": sizes, "batches": batches, "report": str(report)}
        children = launcher.start_job("children:evaluate_sizes", world, *[arguments] * world)
        for child in children:
            assert child.wait(600) == 0, child.err
        counts[world] = json.loads(report.read_text())
    for size in sizes:
        expected = [*counts[1][f"{size} 1"][:2], size]
        for world, found in counts.items():
            assert [found[f"{size} {batch}"] for batch in batches] == [expected] * len(batches), (size, world)
    assert len({tuple(value) for value in counts[1].values()}) > len(sizes) / 2, "the counts say nothing"
    assert torch.get_num_threads() == 1
