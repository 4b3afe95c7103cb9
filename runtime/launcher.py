"""Which place a launcher gave this process: torchrun, `torch.distributed.launch --use_env`, or Slurm's srun."""

import os
import re

from utils import UserError


def place_in_job() -> tuple[int, int, int]:
    """(rank, world size, local rank) of this process as its launcher left them in the environment."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in os.environ:
        # The step's count, where Slurm gives it: a batch script's own shell is one task of a larger job.
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_LOCALID")
    else:
        return 0, 1, 0
    rank, world_size, local_rank = (
        _environment_int(name, fallback) for name, fallback in zip(names, (0, 1, 0), strict=True)
    )
    if not 0 <= rank < world_size:
        raise UserError(f"environment: {names[0]}={rank} is not below {names[1]}={world_size}")
    return rank, world_size, local_rank


def _environment_int(name: str, fallback: int) -> int:
    value = os.environ.get(name, str(fallback))
    if not re.fullmatch(r"\d{1,9}", value):
        raise UserError(f"environment: {name}={value!r} is not a number")
    return int(value)


def set_rendezvous() -> None:
    """Say where rank 0 waits, if the launcher (Slurm) has not."""
    if "MASTER_ADDR" not in os.environ:
        lists = (os.environ.get(f"SLURM_{kind}NODELIST") for kind in ("STEP_", "JOB_", ""))
        os.environ["MASTER_ADDR"] = first_host(next(filter(None, lists), ""))
    if "MASTER_PORT" not in os.environ:
        job = _environment_int("SLURM_JOB_ID", 0) + 97 * _environment_int("SLURM_STEP_ID", 0)
        os.environ["MASTER_PORT"] = str(20000 + job % 20000)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-07,11],cpu1` -> `gpu03`; "" -> this machine."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()  # up to the first comma outside brackets
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first) or "127.0.0.1"
