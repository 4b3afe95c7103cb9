"""Promises 4, 5, 10 and 11: full disks, damaged checkpoints, a broken output, a second run in a directory."""

from __future__ import annotations

import random
import shutil
import time
from pathlib import Path

import pytest
from harness import count, differences, digest, one_line, outcome, spread, temporaries

from models import create_model
from models.checkpoints import CheckpointError, read_checkpoint, weights_of
from models.loading import load_weights
from runtime import checkpoints

OLD_VERSIONS = sorted(Path(__file__).parent.glob("*.ckpt"))
OUTPUTS = [([1], "full"), ([1, 2], "closed"), ([1], "left"), ([2], "full"), ([1, 2], "left"), ([1], "closed")]


def copy_run(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*lock*"))
    return target


@pytest.mark.promise(4)
def test_a_full_disk_costs_no_checkpoint(launcher, tmp_path, flags, unfinished):
    """It is full for args.yaml, or for checkpoints after some of their bytes."""
    before = {path.name: path.read_bytes() for path in unfinished.glob("checkpoint*")}
    largest = min(map(len, before.values()))
    directory = copy_run(unfinished, tmp_path / "run")
    for after in (2000, *spread(10_000, largest, count(3, 40), "offsets")):
        fault = ("full_disk", {"after": after})
        (child,) = launcher.train(directory, *flags, "--resume", "auto", "--checkpoint-steps", "1", faults=[fault])
        assert child.wait() == 3 and one_line(child.err) and "cannot be written: File too large" in child.err, child.err
        assert ("args.yaml" if after == 2000 else "checkpoint") in child.err and not temporaries(directory)
        assert {path.name: path.read_bytes() for path in directory.glob("checkpoint*")} == before
    launcher.complete(directory, *flags, "--resume", "auto")


@pytest.mark.promise(4)
def test_a_reader_beside_a_writer_that_is_killed_finds_whole_files(launcher, tmp_path):
    path = tmp_path / "checkpoint_last.pth"
    checkpoints.save(path, {"model": {}, "epoch": -1})
    seen = set()
    for _ in range(count(3, 20)):
        writer = launcher.start("children:write_again_and_again", path=str(path))
        before, reads = len(seen), 0
        while reads < 40 or (len(seen) < before + 3 and reads < 4000):  # a writer may start late
            seen.add(read_checkpoint(path)["epoch"])
            reads += 1
        writer.kill()
        read_checkpoint(path)
    assert len(seen) > 3, "the file hardly changed between the reads"


def damages(content: bytes, number: int):
    """Bit flips, truncations and runs of zeros, as lost sectors are."""
    drawn = random.Random(0)
    for i in range(number):
        place, length = drawn.randrange(len(content)), drawn.choice([1, 16, 512, 4096])
        flip = content[:place] + bytes([content[place] ^ 1 << drawn.randrange(8)]) + content[place + 1 :]
        zeros = content[:place] + bytes(len(content[place : place + length])) + content[place + length :]
        yield f"{('flip', 'truncation', 'zeros')[i % 3]} at {place}", (flip, content[:place], zeros)[i % 3]


@pytest.mark.promise(5)
def test_a_damaged_checkpoint_is_refused_or_loads_with_identical_content(trained, tmp_path):
    content, path = (trained / "checkpoint_last.pth").read_bytes(), tmp_path / "c.pth"
    expected, refused = digest(read_checkpoint(trained / "checkpoint_last.pth")), 0
    for label, damaged in damages(content, count(150, 3000)):
        path.write_bytes(damaged)
        try:
            assert digest(read_checkpoint(path)) == expected, label
        except CheckpointError as error:
            assert str(path) in str(error) and one_line(str(error)), label
            refused += 1
    assert refused > count(100, 2000)


@pytest.mark.promise(5)
def test_resume_takes_the_newest_intact_checkpoint(launcher, trained, tmp_path, flags):
    directory = copy_run(trained, tmp_path / "run")
    spoiled = [directory / "checkpoint_last.pth", directory / "checkpoint_0003.pth", *directory.glob("*best*")]
    for path in spoiled:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    (child,) = launcher.complete(directory, *flags, "--resume", "auto", "--checkpoint-epochs", "1")
    assert all(path.name in child.err for path in spoiled) and "checkpoint_0002" in child.out
    assert not differences(outcome(directory), outcome(trained))


@pytest.mark.promise(5)
@pytest.mark.parametrize("version", OLD_VERSIONS, ids=lambda path: path.stem)
def test_weights_of_earlier_versions_load(version):
    state = read_checkpoint(version)
    model = create_model(state["arch"], state["num_classes"], tuple(state["input_size"]), state["model_kwargs"])
    for ema in (True, False):
        assert not load_weights(model, weights_of(state, ema))
    assert state["epoch"] == 1 and isinstance(state["args"], dict)


@pytest.mark.promise(10)
@pytest.mark.parametrize(("streams", "way"), OUTPUTS[: count(3, len(OUTPUTS))])
def test_a_run_whose_output_is_broken_is_the_same_run(launcher, tmp_path, flags, trained, streams, way):
    lost = ("lose_output", {"streams": streams, "way": way})
    (child,) = launcher.train(tmp_path / "run", *flags, "--checkpoint-epochs", "1", "--print-freq", "1", faults=[lost])
    assert child.wait() == 0, child.err

    def files(directory: Path) -> set[str]:
        return {path.name for path in directory.iterdir() if path.is_file()}

    assert files(tmp_path / "run") == files(trained) and not differences(outcome(tmp_path / "run"), outcome(trained))


@pytest.mark.promise(11)
def test_a_second_run_in_the_same_directory_is_refused_and_a_killed_one_leaves_no_lock(launcher, tmp_path, flags):
    pause = ("at", {"event": "updated", "n": 6, "action": "pause", "report": str(tmp_path / "paused")})
    (first,) = launcher.train(tmp_path / "run", *flags, workers=2, faults=[pause])
    while not (tmp_path / "paused").exists() and first.process.is_alive():
        time.sleep(0.05)
    (second,) = launcher.train(tmp_path / "run", *flags, "--resume", "auto")
    assert second.wait() == 2 and one_line(second.err) and "another run is using it" in second.err
    first.kill()
    launcher.complete(tmp_path / "run", *flags, "--resume", "auto")  # its workers may still be there
