"""Several processes that find one another, exchange messages and end."""

import json
import os
import socket
import sys
import time

import pytest
import torch
import torch._dynamo  # what DDP imports, for seconds: here once, not in each forked process

from runtime.cli import run_cli
from runtime.processes import Distributed, first_host, init_distributed, local_world_size, rank_in_job
from utils import UserError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")


@pytest.fixture
def environment(monkeypatch):
    """A function that sets the environment of a launcher."""
    for name in (*LAUNCHER, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


def in_child(main, folder, rank, environment):
    """What a forked process does: run_cli(main), with its output in files."""
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    for name in (*LAUNCHER, *SLURM):
        os.environ.pop(name, None)
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        run_cli(main)
    except SystemExit as leave:
        sys.stdout.flush()
        os._exit(leave.code)


def launch(folder, world, main, slurm=False):
    """Run `main` on `world` forked processes (importing torch is slow); [(exit code, stdout, stderr)]."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            job = {"SLURM_JOB_ID": os.getppid(), "SLURM_STEP_ID": 0, "SLURM_STEP_NUM_TASKS": world}
            torchrun = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_PORT": port}
            step = job | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
            in_child(main, folder, rank, step if slurm else torchrun | {"MASTER_ADDR": "127.0.0.1"})
        children.append(child)
    ended = []
    for rank, child in enumerate(children):
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        ended.append((code, *((folder / f"{name}{rank}").read_text() for name in ("out", "err"))))
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("slurm", [False, True], ids=["torchrun", "slurm"])
def test_ranks_find_one_another_and_exchange_messages(tmp_path, slurm):
    def main(argv):
        dist = init_distributed("cpu")
        rank = dist.rank
        total = dist.sum(torch.tensor([1.5, rank])).tolist()
        print(json.dumps([rank, dist.is_main, total, dist.gather_objects({"from": rank})]))

    ended = launch(tmp_path, 2, main, slurm)
    assert [code for code, _, _ in ended] == [0, 0], ended
    for rank, (_, out, _) in enumerate(ended):
        assert json.loads(out) == [rank, rank == 0, [3.0, 1.0], [{"from": 0}, {"from": 1}]]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_when_one_rank_fails_the_others_do_not_hang_and_only_it_says_why(tmp_path, failing):
    def main(argv):
        dist = init_distributed("cpu")
        if dist.rank == failing:
            raise UserError("only here")
        for _ in range(10_000):
            dist.barrier()
            time.sleep(0.005)

    ended = launch(tmp_path, 3, main)
    assert [code for code, _, _ in ended] == [2 if rank == failing else 1 for rank in range(3)], ended
    for rank, (_, _, err) in enumerate(ended):
        said = "error: only here\n" if rank == failing else "error: another process of this job ended: "
        assert err.splitlines()[-1].startswith(said.strip()) and "Traceback" not in err, ended


@pytest.mark.slow
def test_buffers_are_not_broadcast_and_gradients_are_averaged(tmp_path):
    def main(argv):
        dist = init_distributed("cpu")
        model = torch.nn.BatchNorm1d(1)
        parallel = dist.wrap(model)
        parallel(torch.tensor([[0.0], [2.0 + dist.rank]])).square().sum().backward()
        print(json.dumps([model.running_mean.item(), model.bias.grad.item(), parallel.gradient_as_bucket_view]))

    (zero, one) = (json.loads(out) for _, out, _ in launch(tmp_path, 2, main))
    assert zero[0] == pytest.approx(0.1) and one[0] == pytest.approx(0.15) and zero[1:] == one[1:]


def test_one_process_needs_no_group(environment):
    dist = init_distributed("cpu")
    assert dist == Distributed() and dist.is_main
    model, tensor = torch.nn.Linear(2, 2), torch.ones(2)
    assert dist.wrap(model, sync_bn=True) is model
    assert dist.sum(tensor) is not tensor
    assert dist.gather_objects("a") == ["a"]


def test_a_process_in_a_batch_script_without_srun_waits_for_no_others(environment):
    environment(SLURM_JOB_ID=7, SLURM_PROCID=0, SLURM_LOCALID=0, SLURM_NTASKS=8)
    assert rank_in_job() == (0, 1, 0)
    environment(SLURM_STEP_NUM_TASKS=8, SLURM_PROCID=3, SLURM_LOCALID=1)
    assert rank_in_job() == (3, 8, 1)
    environment(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2)  # torchrun within srun
    assert rank_in_job() == (1, 2, 1) and local_world_size() == 2


def test_a_device_that_is_not_there_is_named():
    for name in ("gpu", "cuda:99", "cpu:1"):
        with pytest.raises(UserError, match=f"--device {name}"):
            init_distributed(name)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[03-07,11],cpu1", "gpu03"), ("n1,n2", "n1"), ("a-b[1,2]-ib", "a-b1-ib"), ("host", "host"), ("", "127.0.0.1")],
)
def test_the_first_host_of_a_slurm_node_list(nodes, first):
    assert first_host(nodes) == first
