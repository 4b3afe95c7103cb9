"""This process's place in the job: joining the others, and what the ranks say to one another.

Rank and world size come from `runtime.launcher` alone.
"""

import os
import re
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from runtime.job_guard import JobGuard
from runtime.launcher import place_in_job, set_rendezvous
from utils import UserError, one_line

# How long a rank may let the others wait before the run is given up. Control messages may have to wait while
# the main rank downloads a dataset. A rank that *ends* is noticed at once, by the job guard.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CONTROL_TIMEOUT = timedelta(minutes=60)
# DDP compares the strides of a gradient with those of its place in the bucket, also along axes of one entry, as
# depthwise weights have: there they say nothing about the memory. This matches the warning if all others agree.
_AXES = range(4)
SAME_MEMORY = (
    r"(?s)Grad strides do not match bucket view strides.*"
    rf"grad\.sizes\(\) = \[{', '.join(f'(?:(?P<one{i}>1)|[0-9]+)' for i in _AXES)}\], "
    rf"strides\(\) = \[{', '.join(f'(?P<stride{i}>[0-9]+)' for i in _AXES)}\].*"
    rf"strides\(\) = \[{', '.join(f'(?(one{i})[0-9]+|(?P=stride{i}))' for i in _AXES)}\]"
)


@dataclass
class _Job:
    guard: JobGuard
    control: torch_dist.ProcessGroup


_job: _Job | None = None


@dataclass(frozen=True)
class Distributed:
    """This process's place in the job. The default is the only process there is.

    Every method must be called by all ranks. Control messages (`barrier`, `max`, the objects) travel
    over a gloo group of their own, so they never wait for the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if _job is not None:
            torch_dist.barrier(group=_job.control)

    def max(self, value: int) -> int:
        """The largest `value` of all ranks, such as the number of a signal that one of them got."""
        if _job is None:
            return value
        message = torch.tensor([value], dtype=torch.int64)
        torch_dist.all_reduce(message, torch_dist.ReduceOp.MAX, group=_job.control)
        return int(message)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks, as a new tensor; the argument is left alone."""
        if _job is None:
            return tensor.clone()
        total = tensor.detach().clone()
        torch_dist.all_reduce(total, group=_job.control if total.device.type == "cpu" else None)
        return total

    def broadcast_object(self, obj: Any) -> Any:
        """The main rank's `obj`, on every rank."""
        if _job is None:
            return obj
        box = [obj]
        torch_dist.broadcast_object_list(box, src=0, group=_job.control)
        return box[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's `obj`, in the order of the ranks, on every rank."""
        if _job is None:
            return [obj]
        box = [None] * self.world_size
        torch_dist.all_gather_object(box, obj, group=_job.control)
        return box

    def wrap(self, model: nn.Module, sync_bn: bool = False, find_unused: bool = False) -> nn.Module:
        """`model` for data-parallel training; the model itself where there is one process."""
        if _job is None:
            return model
        if sync_bn and self.device.type == "cuda":  # torch has no synchronised batch norm on CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        warnings.filterwarnings("ignore", SAME_MEMORY)
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=find_unused)


def init_distributed(device: str = "auto") -> Distributed:
    """Join the other processes of this job, if there are any.

    Understands what torchrun, `torch.distributed.launch --use_env` (RANK, WORLD_SIZE, LOCAL_RANK) and Slurm's
    srun (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID) leave in the environment.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N" (one process only).

    Raises:
        UserError: for a device that is not there, a broken environment, or processes that do not meet.
    """
    global _job
    rank, world_size, local_rank = place_in_job()
    chosen = _choose_device(device, world_size, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Distributed(device=chosen)
    if _job is None:
        set_rendezvous()
        _job = _join_job(rank, world_size, chosen)
    return Distributed(rank, world_size, local_rank, chosen)


def _join_job(rank: int, world_size: int, device: torch.device) -> _Job:
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        found, _, _ = next(rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT))
        # torchrun's store outlives a restart of the group: without a prefix of their own, the new ranks would
        # find the addresses of those that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch_dist.PrefixStore(f"attempt {attempt} of {world_size}", found)
        torch_dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        guard = JobGuard(rank, world_size, store)
        return _Job(guard, torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    except (RuntimeError, OSError, ValueError) as error:  # gloo's own errors are plain RuntimeErrors
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {world_size} processes did not meet at {address}: {one_line(error)}") from error


def _choose_device(name: str, world_size: int, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if match.group(1) and world_size > 1:
        raise UserError(f"--device {name}: with {world_size} processes each takes its own GPU; say cuda")
    # Slurm may show each task its own GPU alone (--gpus-per-task).
    alone = count == 1 and "SLURM_PROCID" in os.environ
    index = int(match.group(1) or (0 if alone else local_rank))
    if index >= count:
        raise UserError(f"--device {name}: GPU {index} is asked for, this machine has {count}")
    return torch.device("cuda", index)


def job_guard() -> JobGuard | None:
    """What watches over this job's processes; None where there is one process."""
    return None if _job is None else _job.guard


def close_distributed() -> None:
    """Leave the job in good order; does nothing where there is none."""
    global _job
    if _job is not None:
        job, _job = _job, None
        job.guard.leave(0, "")
        torch_dist.destroy_process_group()
