"""Run a script of this project: exit codes, and errors in one line."""

import errno
import multiprocessing
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
import torch.distributed as torch_dist

from models.checkpoints import CheckpointError
from models.loading import WeightMismatch
from models.pretrained import ModelError
from runtime.processes import close_distributed
from utils import JobError, MachineError, UserError, flush, one_line, tell

SHORTAGES = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def run_cli(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run `main(None)` and end the process with the exit codes of this project.

    0 success, 2 user error, 3 machine error, 4 non-finite loss, 128 + n signal, 1 bug in the program (the only case
    with a traceback). Every process reports its own error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # it is closed: another file must not get its descriptor
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    code, text = _outcome(main)
    if text:
        tell(text)
    for stream in (sys.stdout, sys.stderr):
        flush(stream)
    if code == 0:
        close_distributed()
    elif torch_dist.is_initialized():  # the interpreter's exit may hang in a collective with dead ranks
        for child in multiprocessing.active_children():
            child.terminate()
        os._exit(code)
    sys.exit(code)


def _outcome(main: Callable[[Sequence[str] | None], None]) -> tuple[int, str]:
    """Run `main`; returns the exit code and the message for the user."""
    try:
        main(None)
    except (JobError, CheckpointError, ModelError, WeightMismatch) as error:
        return getattr(error, "exit_code", UserError.exit_code), f"error: {one_line(error)}"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "stopped by SIGINT"
    except SystemExit as leave:
        return (1, leave.code) if isinstance(leave.code, str) else (leave.code or 0, "")
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            return MachineError.exit_code, f"error: out of memory: {one_line(error)}"
        if isinstance(error, OSError) and error.errno in SHORTAGES:
            return MachineError.exit_code, f"error: {one_line(error)}"
        lost = isinstance(error, torch_dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
        if torch_dist.is_initialized() and lost:  # most likely because another rank ended, which reports the reason
            return 1, f"error: another process of this job ended: {one_line(error)[:200]}"
        return 1, traceback.format_exc().rstrip()
    return 0, ""
