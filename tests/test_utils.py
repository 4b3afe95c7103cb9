"""Messages, keyed randomness, atomic writes, signals."""

import io
import os
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import MachineError, StopSignals, atomic_write, key_seed, say, seed_step, seeded


# ------------------------------------------------------------------------------------------ keyed randomness
def test_seeds_are_the_same_everywhere_and_differ_by_key():
    assert key_seed(0, "order", 3) == 4106170028138913670  # runs outlive versions
    keys = [(a, b) for a in range(40) for b in range(40)]
    keys += [("1", 2), (12,), ("12",), (), ("",), (1, 2, 3), (-1, 2)]
    seeds = {key_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert key_seed(np.int64(3), "a") == key_seed(3, "a")


def draw():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_a_seeded_block_repeats_and_leaves_the_generators_alone():
    with seeded(1, "sample", 5):
        first = draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    expected = draw(), draw()
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    before = draw()
    with pytest.raises(ZeroDivisionError), seeded(1, "sample", 5):
        assert draw() == first
        _ = 1 / 0
    assert (before, draw()) == expected
    with seeded(1, "sample", 5):
        with seeded(2):
            draw()
        assert draw() == first
    with seeded(1, "sample", 6):
        assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_seed_step_repeats_a_models_draws():
    seed_step(0, 1, 2)
    first = torch.rand(3)
    seed_step(0, 1, 2)
    assert torch.equal(torch.rand(3), first)


# -------------------------------------------------------------------------------------------------- messages
def test_nobody_to_talk_to_is_no_error():
    closed = io.StringIO()
    closed.close()
    say("x", closed)
    with open("/dev/full", "w") as full:
        say("x" * 100_000, full)


def test_a_stream_that_knows_few_characters_gets_escapes():
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    say("é", stream)
    assert stream.buffer.getvalue() == b"\\xe9\n"


# -------------------------------------------------------------------------------------------- durable writes
def files(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("data", [b"bytes", "t\u00e4xt", lambda file: file.write(b"written")])
def test_atomic_write_replaces_the_file(tmp_path, data):
    path = tmp_path / "file"
    path.write_text("old")
    atomic_write(path, data)
    assert path.read_bytes() in (b"bytes", "t\u00e4xt".encode(), b"written")
    assert files(tmp_path) == ["file"]


@pytest.fixture
def file_size_limit():
    """A function that lets no file grow beyond so many bytes: the kernel then refuses as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, file_size_limit):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for offset in (0, 1, 4095, 4096, 70_000, 199_999):
        file_size_limit(offset)
        with pytest.raises(MachineError, match=f"^{path}: cannot be written: File too large$"):
            atomic_write(path, bytes(200_000))
        assert path.read_bytes() == b"old" and files(tmp_path) == ["file"]


def test_whatever_is_wrong_with_the_place_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for path in ("file/below", "missing/file", "folder", "n" * 300):
        with pytest.raises(MachineError, match=f"{path}: cannot be written: "):
            atomic_write(tmp_path / path, b"x")
    assert files(tmp_path) == ["file", "folder"] and files(tmp_path / "folder") == []


def test_an_error_of_the_writer_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError):
        atomic_write(tmp_path / "file", lambda file: file.write(b"n") / 0)
    assert (tmp_path / "file").read_text() == "old" and files(tmp_path) == ["file"]


def test_a_write_is_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        calls.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_dir()))
        real_fsync(descriptor)

    def replace(source, target):
        calls.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    atomic_write(tmp_path / "file", b"x")
    assert calls == [("fsync", False), "rename", ("fsync", True)]


# --------------------------------------------------------------------------------------------------- signals
def test_the_first_signal_is_remembered_and_the_rest_ignored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        assert stop.signum is None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert stop.signum == signal.SIGUSR1
    assert signal.getsignal(signal.SIGTERM) is before
