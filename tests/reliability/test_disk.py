"""Rows 6 and 7: what a full or read-only disk, or a reader at the wrong moment, may see."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from harness import Launcher, copy_run, count, file_digest, one_line, spread, temporaries, traced

from models.checkpoints import read_checkpoint
from runtime import checkpoints
from utils import UserError

# Beside checkpoint_last.pth, every kind of file that a run writes.
OTHER_FILES = ["log.txt", "checkpoint_best", "loss_plot.png", "acc_plot.png", "args.yaml", "events.out"]


def refusal(launcher: Launcher, source: Path, directory: Path, flags: list[str], fault: tuple, file: str) -> str:
    """What is wrong with how a resumed run met a disk that refuses ``file``; "" for nothing."""
    copy_run(source, directory)
    before = {path.name: file_digest(path) for path in directory.iterdir() if path.is_file()}
    (child,) = launcher.train(directory, *flags, "--resume", "auto", "--checkpoint-steps", "1", faults=[fault])
    code, told = child.wait(), child.err
    changed = [
        name
        for name, old in before.items()
        if file in name and (not (directory / name).exists() or file_digest(directory / name) != old)
    ]
    appended = [name for name in changed if name.startswith("events.out")]  # written as it grows, by TensorBoard
    if code != 3 or not one_line(told) or file not in told:
        return f"exit {code}, said {told[-700:]!r}"
    if set(changed) - set(appended):
        return f"{changed} changed"
    if left := temporaries(directory):
        return f"left {left}"
    try:
        read_checkpoint(directory / "checkpoint_last.pth")
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.promise(6)
@pytest.mark.parametrize("part", [0, 1])
def test_a_disk_that_fills_up_costs_no_checkpoint(launcher, tmp_path, flags, unfinished, record, part):
    file = "checkpoint_last.pth"
    offsets = spread(0, (unfinished / file).stat().st_size, count(4, 40), "offsets")[part::2]
    failures = []
    for offset in offsets:
        fault = ("full_disk", {"after": offset, "match": file})
        if wrong := refusal(launcher, unfinished, tmp_path / f"full{offset}", flags, fault, file):
            failures.append(f"full after {offset} bytes of {file}: {wrong}")
    record(
        "offsets at which a full disk left the checkpoint as it was, no temporary, one line and exit 3",
        len(offsets),
        failures,
    )


@pytest.mark.promise(6)
def test_every_other_file_may_meet_a_full_disk(launcher, tmp_path, flags, unfinished, record):
    failures = []
    for file in OTHER_FILES:
        fault = ("full_disk", {"after": 10, "match": file})
        if wrong := refusal(launcher, unfinished, tmp_path / file, flags, fault, file):
            failures.append(f"{file}: {wrong}")
    record(
        "other files (log, plots, events, arguments) whose full disk ended the run in the same way",
        len(OTHER_FILES),
        failures,
    )


@pytest.mark.promise(6)
def test_the_kernel_may_refuse_to_write(launcher, tmp_path, flags, unfinished, record):
    """RLIMIT_FSIZE: an error of the system itself, at a write from wherever."""
    size = (unfinished / "checkpoint_last.pth").stat().st_size
    sizes = spread(60_000, size, count(1, 4), "limits") if size > 60_000 else [size // 2]
    failures = []
    for limit in sizes:
        fault = ("file_limit", {"size": limit})
        if wrong := refusal(launcher, unfinished, tmp_path / f"limit{limit}", flags, fault, "checkpoint_last.pth"):
            failures.append(f"files of at most {limit} bytes: {wrong}")
    record("limits of the system on a file's size that ended the run in the same way", len(sizes), failures)


@pytest.mark.promise(6)
def test_a_read_only_directory_is_told(launcher: Launcher, tmp_path, flags, unfinished, record):
    failures, stopped = [], copy_run(unfinished, tmp_path / "stopped")
    before = {path.name: file_digest(path) for path in stopped.iterdir() if path.is_file()}
    (child,) = launcher.train(stopped, *flags, "--resume", "auto", faults=[("read_only", {"match": str(stopped)})])
    if child.wait() != 3 or not one_line(child.err) or str(stopped) not in child.err:
        failures.append(f"a read-only run directory: exit {child.wait()}, said {child.err[-700:]!r}")
    if before != {path.name: file_digest(path) for path in stopped.iterdir() if path.is_file()}:
        failures.append("a read-only run directory: a file changed")
    # No file system hook: even root cannot make a directory here.
    (child,) = launcher.train(Path("/proc/self/run"), *flags)
    if child.wait() != 3 or not one_line(child.err) or "/proc/self/run" not in child.err:
        failures.append(f"a directory below /proc: exit {child.wait()}, said {child.err[-700:]!r}")
    record("directories that cannot be written: one line, exit 3", 2, failures)


@pytest.mark.promise(6)
def test_a_full_disk_ends_every_process(launcher: Launcher, tmp_path, flags, unfinished, record):
    directory = copy_run(unfinished, tmp_path / "two")
    old = file_digest(directory / "checkpoint_last.pth")
    fault = ("full_disk", {"after": 1000, "match": "checkpoint_last"})
    children = launcher.train(
        directory,
        *flags,
        "--resume",
        "auto",
        "--checkpoint-steps",
        "1",
        world=2,
        faulty_rank=0,
        faults=[fault],
    )
    codes = [child.wait() for child in children]
    told = "".join(child.err for child in children)
    wrong = [] if codes == [3, 3] and one_line(told) else [f"exit {codes}, said {told[-700:]!r}"]
    if file_digest(directory / "checkpoint_last.pth") != old:
        wrong.append("the checkpoint changed")
    record("jobs of two processes ended by the main one's full disk", 1, wrong)


def unsafe_writes(entries: list[dict]) -> list[str]:
    """The rules of a durable write that a trace of system calls breaks."""
    wrong = []
    synced: dict[str, int] = {}
    for position, entry in enumerate(entries):
        path = Path(entry["path"])
        if entry["call"] == "fsync":
            synced[str(path)] = entry["size"]
        elif entry["call"] == "replace":
            target = Path(entry["target"])
            if path.parent != target.parent:
                wrong.append(f"{target.name}: the temporary is in another directory")
            if synced.get(str(path)) != entry["size"]:
                wrong.append(f"{target.name}: renamed before all of it was synced")
            later = [e for e in entries[position + 1 : position + 3] if e["call"] == "fsync"]
            if not any(e["path"] == str(target.parent) for e in later):
                wrong.append(f"{target.name}: the directory was not synced after the rename")
        elif entry["call"] == "open":
            moved = any(e["call"] == "replace" and e["path"] == entry["path"] for e in entries[position:])
            if not moved and "events.out" not in path.name and "lock" not in path.name:
                wrong.append(f"{path.name}: written in place")
    return wrong


@pytest.mark.promise(7)
def test_every_file_of_a_run_is_written_in_the_safe_order(launcher: Launcher, tmp_path, flags, record):
    trace = tmp_path / "trace"
    directory = tmp_path / "run"
    launcher.complete(
        directory,
        *flags,
        "--checkpoint-steps",
        "2",
        "--checkpoint-epochs",
        "1",
        faults=[("trace_writes", {"path": str(trace), "below": str(directory)})],
    )
    entries = traced(trace)
    renamed = {Path(entry["target"]).name for entry in entries if entry["call"] == "replace"}
    assert {"log.txt", "loss_plot.png", "acc_plot.png", "args.yaml", "checkpoint_last.pth"} <= renamed, renamed
    writes = [entry for entry in entries if entry["call"] in ("replace", "open")]
    record(
        "files opened or renamed by a run: temporary, fsync, rename, fsync of the directory",
        len(writes),
        unsafe_writes(entries),
    )


@pytest.mark.promise(7)
def test_a_reader_beside_the_writer_always_finds_a_whole_file(launcher: Launcher, tmp_path: Path, record):
    path = tmp_path / "checkpoint_last.pth"
    wanted = count(100, 1000)
    checkpoints.save(path, {"model": {"weight": torch.zeros(1)}, "epoch": 0})
    wrong, reads, killed, changes, last = [], 0, 0, 0, None
    writer = launcher.start("children:write_again_and_again", path=str(path), times=10**6)
    # On a busy machine the writer may fall behind: read on until the file changed often enough to tell.
    while reads < wanted or (changes <= wanted / 20 and reads < 20 * wanted):
        if reads % 50 == 49 and killed < reads // 50 + 1:  # a writer that dies at any moment changes nothing
            writer.kill()
            writer.wait()
            killed += 1
            writer = launcher.start("children:write_again_and_again", path=str(path), times=10**6)
        try:
            state = read_checkpoint(path)
            changes, last = changes + (state["epoch"] != last), state["epoch"]
        except UserError as error:
            wrong.append(str(error))
        reads += 1
    writer.kill()
    writer.wait()
    assert changes > wanted / 20, "the file hardly changed between the reads"
    record(f"reads beside a writer, which was killed {killed} times, that found a whole checkpoint", reads, wrong)
