"""Errors and exit codes, several processes that end together, keyed randomness, durable writes, signals."""

import json
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # what DDP imports, for seconds: here once, not in each forked process

import utils
from utils import (
    Distributed,
    Interrupted,
    MachineError,
    NonFiniteError,
    StopSignals,
    UserError,
    atomic_write,
    init_distributed,
    key_seed,
    run_cli,
    seed_step,
    seeded,
)

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


# ------------------------------------------------------------------------------------------------ exit codes
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--lr x: not\na number"), 2, "error: --lr x: not a number"),
        (MachineError("log.txt: cannot be written"), 3, "error: log.txt: cannot be written"),
        (NonFiniteError("loss is nan"), 4, "error: loss is nan"),
        (Interrupted(signal.SIGTERM, "saved"), 143, "error: stopped by SIGTERM: saved"),
        (Interrupted(signal.SIGUSR1), 138, "error: stopped by SIGUSR1"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
    ],
)
def test_an_expected_end_is_one_line_and_its_exit_code(error, code, line, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as leave:
        run_cli(main)
    assert leave.value.code == code
    assert capsys.readouterr().err == line + "\n"


def test_a_fault_of_the_program_keeps_its_traceback_and_success_is_silent(capsys):
    with pytest.raises(SystemExit) as leave:
        run_cli(lambda argv: [][1])
    assert leave.value.code == 1
    assert "IndexError" in capsys.readouterr().err
    with pytest.raises(SystemExit) as leave:
        run_cli(lambda argv: None)
    assert leave.value.code == 0
    assert capsys.readouterr().err == ""


# ----------------------------------------------------------------------------------------- several processes
def collectives(dist):
    for _ in range(10_000):
        dist.barrier()
        time.sleep(0.005)


def training(dist):
    model = dist.wrap(torch.nn.Linear(4, 4))
    for _ in range(10_000):
        model(torch.randn(2, 4)).sum().backward()
        time.sleep(0.005)


def idle(dist):
    time.sleep(60)


def end_like(how):
    if how == "user error":
        raise UserError("only here")
    if how == "fault":
        raise ArithmeticError("of the program")
    if how == "signal":
        raise Interrupted(signal.SIGTERM)
    if how == "exit":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def in_child(main, folder, rank, environment):
    """What a forked process does: run_cli(main), with its output in files."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    for name in LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(environment)
    try:
        run_cli(main)
    except SystemExit as leave:
        sys.stdout.flush()
        os._exit(leave.code)


def launch(folder, world, main, slurm=False):
    """Run `main` on `world` forked processes (importing torch is slow); [(exit code, stdout, stderr)]."""
    if slurm:
        names, meeting = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"), {"SLURM_JOB_ID": str(os.getpid())}
    else:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    children, codes = [], {}
    for rank in range(world):
        child = os.fork()
        if child == 0:
            place = dict(zip(names, (str(rank), str(world), str(rank)), strict=True))
            in_child(main, folder, rank, meeting | place)
        children.append(child)
    deadline = time.monotonic() + 60
    while len(codes) < world and time.monotonic() < deadline:
        for child in set(children) - codes.keys():
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    for child in set(children) - codes.keys():
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    said = [[(folder / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(world)]
    return [(codes.get(child, "hung"), *outputs) for child, outputs in zip(children, said, strict=True)]


@pytest.mark.parametrize("slurm", [False, True], ids=["torchrun", "slurm"])
def test_ranks_find_one_another_and_agree(tmp_path, slurm):
    def main(argv):
        dist = init_distributed("cpu")
        rank = dist.rank
        print(
            json.dumps(
                [
                    rank,
                    dist.is_main,
                    dist.any(rank == 1),
                    dist.any(False),
                    dist.max(10 * rank),
                    dist.sum(torch.tensor([1.5, rank])).tolist(),
                    dist.broadcast_object({"from": rank}),
                    dist.gather_objects(rank),
                ]
            )
        )

    ended = launch(tmp_path, 2, main, slurm)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for rank, (_, out, _) in enumerate(ended):
        assert json.loads(out) == [rank, rank == 0, True, False, 10, [3.0, 1.0], {"from": 0}, [0, 1]]


@pytest.mark.parametrize(
    ("how", "failing", "others", "code", "said"),
    [
        ("user error", 1, collectives, 2, "error: only here"),
        ("user error", 0, idle, 2, "error: only here"),
        ("fault", 1, training, 1, "ArithmeticError: of the program"),
        ("signal", 1, collectives, 143, "stopped by SIGTERM"),
        ("exit", 1, training, 1, "rank 1 ended without a word"),
        ("SIGKILL", 0, collectives, 1, "rank 0 ended without a word"),
        ("SIGKILL", 2, training, 1, "rank 2 ended without a word"),
    ],
)
def test_when_one_rank_ends_all_end_with_its_code(tmp_path, how, failing, others, code, said):
    def main(argv):
        dist = init_distributed("cpu")
        if dist.rank != failing:
            others(dist)
        if others is training:
            dist.wrap(torch.nn.Linear(4, 4))
        time.sleep(0.2)
        end_like(how)

    ended = launch(tmp_path, 3, main)
    assert [c for rank, (c, _, _) in enumerate(ended) if rank != failing] == [code, code], ended
    told = "".join(err for _, _, err in ended)
    assert told.count(said) == 1, told
    assert told.count("Traceback") == (how == "fault"), told


def test_ranks_that_leave_early_let_the_main_one_finish_its_save(tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "GRACE", 0.5)

    def save(file):
        time.sleep(2)
        file.write(b"saved")

    for how, code in (("signal", 143), ("SIGKILL", 1)):

        def main(argv, how=how):
            dist = init_distributed("cpu")
            if dist.is_main:
                atomic_write(tmp_path / how, save)
            if dist.is_main and how == "SIGKILL":
                idle(dist)
            end_like(how)

        ended = launch(tmp_path, 2, main)
        assert ended[0][0] == code and ended[1][0] in (code, -signal.SIGKILL), ended
        assert (tmp_path / how).read_bytes() == b"saved"


@pytest.mark.parametrize("joined", [True, False])
def test_an_error_of_all_ranks_is_told_once(tmp_path, joined):
    def main(argv):
        if joined:
            init_distributed("cpu")
        raise UserError("--data-path x: no such folder")

    ended = launch(tmp_path, 3, main)
    assert [code for code, _, _ in ended] == [2, 2, 2], ended
    assert "".join(err for _, _, err in ended) == "error: --data-path x: no such folder\n"


def test_one_process_needs_no_group(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    dist = init_distributed("cpu")
    assert dist == Distributed() and dist.is_main
    model, tensor = torch.nn.Linear(2, 2), torch.ones(2)
    assert dist.wrap(model, sync_bn=True) is model
    assert dist.sum(tensor) is not tensor and dist.any(True) and not dist.any(False)
    assert dist.gather_objects("a") == ["a"]


@pytest.mark.parametrize(
    "settings",
    [
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "4", "SLURM_NTASKS": "4"},
    ],
)
def test_a_broken_environment_is_named(monkeypatch, settings):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="environment: (RANK|SLURM_PROCID)"):
        init_distributed("cpu")


def test_a_device_that_is_not_there_is_named():
    for name in ("gpu", "cuda:99", "cpu:1"):
        with pytest.raises(UserError, match=f"--device {name}"):
            init_distributed(name)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[03-07,11],cpu1", "gpu03"),
        ("n1,n2", "n1"),
        ("a-b[1,2]-ib", "a-b1-ib"),
        ("host", "host"),
        ("", "127.0.0.1"),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodes, first):
    assert utils.first_host(nodes) == first


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


def test_a_concurrent_reader_sees_whole_files_only(tmp_path):
    path, seen, done = tmp_path / "file", set(), threading.Event()
    contents = [bytes([i]) * 50_000 for i in range(200)]
    atomic_write(path, contents[0])

    def read():
        while not done.is_set():
            seen.add(path.read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for content in contents:
        atomic_write(path, content)
    done.set()
    reader.join()
    assert len(seen) > 1 and seen <= set(contents)


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
