"""The processes of a job: this process's rank, joining the other processes, and communication.

torchrun and Slurm end a job when one of its processes fails, so this module does not monitor them.
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

from utils import UserError, one_line, say

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# Control messages may have to wait while the main rank downloads a data set or writes checkpoints.
CONTROL_TIMEOUT = timedelta(minutes=60)

_control: torch_dist.ProcessGroup | None = None  # gloo, for control messages; None in a job of one process


@dataclass(frozen=True)
class Distributed:
    """This process's rank in the job. The default is a job of one process.

    All ranks must call every method except `say`. `barrier` and `gather_objects` use a separate gloo group, so that
    they never wait for the GPU.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def say(self, line: str) -> None:
        """Print a line on the main process."""
        if self.is_main:
            say(line)

    def barrier(self) -> None:
        if _control is not None:
            torch_dist.barrier(group=_control)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks, as a new tensor."""
        total = tensor.detach().clone()
        if _control is not None:
            torch_dist.all_reduce(total, group=_control if total.device.type == "cpu" else None)
        return total

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's `obj`, in the order of the ranks, on every rank."""
        objects = [obj] * self.world_size
        if _control is not None:
            torch_dist.all_gather_object(objects, obj, group=_control)
        return objects

    def wrap(self, model: nn.Module, sync_bn: bool = False, find_unused: bool = False) -> nn.Module:
        """Wrap `model` for data-parallel training; returns it unchanged in a job of one process.

        Buffers are not broadcast in each step: batch norm statistics are synchronized before evaluation, and the
        other buffers are constant.
        """
        if _control is None:
            return model
        if sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Gradients of depthwise weights differ from their bucket view only along axes of length 1.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # torch 2.11 has no other name for it
        return nn.parallel.DistributedDataParallel(
            model,
            device_ids=[self.device.index] if self.device.type == "cuda" else None,
            find_unused_parameters=find_unused,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def rank_in_job() -> tuple[int, int, int]:
    """(rank, world size, local rank) from the environment variables of torchrun or, within an srun step, of Slurm.

    Slurm also sets variables in the shell of a batch script, which is not a step and runs a single process.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_STEP_NUM_TASKS" in os.environ:
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
    else:
        return 0, 1, 0
    return tuple(int(os.environ.get(name, "0")) for name in names)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-07,11],cpu1` -> `gpu03`; "" -> this machine."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()  # up to the first comma outside brackets
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first) or "127.0.0.1"


def init_distributed(device: str = "auto") -> Distributed:
    """Join the other processes of this job, if there are any: with NCCL on CUDA, with gloo on a CPU.

    Args:
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N" (one process only).

    Raises:
        UserError: the device does not exist, or the processes cannot connect.
    """
    global _control
    rank, world_size, local_rank = rank_in_job()
    chosen = _choose_device(device, world_size, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1 and _control is None:
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "")))
        # The port depends on job and step, so that two jobs on one machine do not collide.
        step = int(os.environ.get("SLURM_JOB_ID", "0")) + 97 * int(os.environ.get("SLURM_STEP_ID", "0"))
        os.environ.setdefault("MASTER_PORT", str(20000 + step % 20000))
        try:
            found, _, _ = next(rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT))
            # torchrun's store outlives a restart: without a prefix, the new ranks would find the dead ones' addresses.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            torch_dist.init_process_group(
                "nccl" if chosen.type == "cuda" else "gloo",
                store=torch_dist.PrefixStore(f"attempt {attempt} of {world_size}", found),
                rank=rank,
                world_size=world_size,
                timeout=COLLECTIVE_TIMEOUT,
                device_id=chosen if chosen.type == "cuda" else None,
            )
            _control = torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT)
        except (RuntimeError, OSError, ValueError) as error:  # gloo's own errors are plain RuntimeErrors
            address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise UserError(f"the {world_size} processes did not meet at {address}: {one_line(error)}") from error
        # A rank that failed while others still connect to each other would leave them waiting for CONTROL_TIMEOUT.
        torch_dist.barrier(group=_control)
    return Distributed(rank, world_size, chosen)


def _choose_device(name: str, world_size: int, local_rank: int) -> torch.device:
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    kind, _, number = name.partition(":")
    # Under Slurm, a task may see only its own GPU (--gpus-per-task).
    index = number or str(0 if count == 1 and "SLURM_PROCID" in os.environ else local_rank)
    if kind not in ("auto", "cuda") or index not in map(str, range(count)) or (number and world_size > 1):
        raise UserError(f"--device {name}: choose auto, cpu, cuda or, for one process, cuda:N; there are {count} GPUs")
    return torch.device("cuda", int(index))


def close_distributed() -> None:
    """Leave the job, once all ranks are done; does nothing in a job of one process."""
    global _control
    if _control is not None:
        torch_dist.barrier(group=_control)
        _control = None
        torch_dist.destroy_process_group()
