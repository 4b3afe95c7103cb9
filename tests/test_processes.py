"""What a process learns of its job from the environment. Jobs of several processes: reliability/test_jobs.py."""

import pytest
import torch

from runtime.processes import Distributed, first_host, init_distributed, rank_in_job
from utils import UserError

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID")


@pytest.fixture
def environment(monkeypatch):
    """A function that sets the environment of a launcher."""
    for name in (*LAUNCHER, *SLURM):
        monkeypatch.delenv(name, raising=False)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


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
    assert rank_in_job() == (1, 2, 1)


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
