"""Several processes that find one another and end together."""

import json
import os
import signal
import socket
import sys
import time
import warnings

import pytest
import torch
import torch._dynamo  # what DDP imports, for seconds: here once, not in each forked process

from runtime import job_guard
from runtime.entry_point import run_cli
from runtime.launcher import first_host
from runtime.processes import Distributed, init_distributed
from utils import Interrupted, UserError, atomic_write

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


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
        assert json.loads(out) == [rank, rank == 0, 10, [3.0, 1.0], {"from": 0}, [0, 1]]


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
    monkeypatch.setattr(job_guard, "GRACE", 0.5)

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


@pytest.mark.parametrize(("groups", "told"), [(8, 0), (1, 1)], ids=["depthwise", "dense"])
def test_strides_of_gradients_are_complained_of_only_where_the_memory_differs(tmp_path, groups, told):
    def main(argv):
        dist = init_distributed("cpu")
        with warnings.catch_warnings(record=True) as caught:
            parallel = dist.wrap(torch.nn.Conv2d(8, 8, 3, groups=groups))
            weight = parallel.module.weight
            if groups == 1:  # DDP has planned with other strides
                weight.data = weight.data.to(memory_format=torch.channels_last)
            parallel(torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)).sum().backward()
        assert weight.grad.stride() == ((9, 1, 3, 1) if groups == 8 else (72, 1, 24, 8))
        print(*(warning.message for warning in caught))

    for code, said, _ in launch(tmp_path, 2, main):
        assert code == 0 and said.count("Grad strides do not match") == told, said


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
    assert dist.sum(tensor) is not tensor and dist.max(3) == 3
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
    assert first_host(nodes) == first
