"""How a script of this project begins and ends: its exit codes, and who tells the user what went wrong."""

import contextlib
import errno
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn, TextIO

import torch
import torch.distributed as torch_dist

from models.checkpoints import CheckpointError
from models.loading import WeightMismatch
from runtime.job_guard import exit_now
from runtime.processes import close_distributed, job_guard
from utils import JobError, MachineError, UserError, one_line, tell


def run_cli(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run `main(None)` and end the process with the exit codes of this project.

    0 done, 2 the user's mistake, 3 the machine's, 4 a non-finite loss, 128 + n a signal, 1 a fault of the
    program (the only case with a traceback). With several processes each different error is reported once,
    and the other ranks end with the code of the one that failed.
    """
    shield_streams()
    code, text = _outcome(main)
    guard = job_guard()
    if guard is None:
        # Before the ranks know one another they make the same mistakes: one of each machine reports them.
        if text and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            tell(text)
        sys.exit(code)
    if code:
        guard.leave(code, text)
        exit_now(code)
    close_distributed()
    sys.exit(0)


def _outcome(main: Callable[[Sequence[str] | None], None]) -> tuple[int, str]:
    """(exit code, what to tell the user) of running `main`."""
    try:
        main(None)
    except JobError as error:
        return error.exit_code, f"error: {one_line(error)}"
    except (CheckpointError, WeightMismatch) as error:
        return UserError.exit_code, f"error: {one_line(error)}"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "stopped by SIGINT"
    except SystemExit as leave:
        if isinstance(leave.code, str):
            return 1, leave.code
        return leave.code or 0, ""
    except Exception as error:
        if short := _shortage(error):
            return MachineError.exit_code, f"error: {short}"
        # A collective that broke because another rank ended is that rank's to explain.
        guard = job_guard()
        if guard is not None and _is_lost_connection(error):
            verdict = guard.wait_for_verdict()
            if verdict is not None:
                return verdict, ""
        return 1, traceback.format_exc().rstrip()
    return 0, ""


def _shortage(error: Exception) -> str:
    """What the machine has too little of, where that is what ended the program."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"the memory does not suffice: {one_line(error)}"
    if isinstance(error, OSError) and error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
    ):
        return one_line(error)
    return ""


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE) is not None
    )


class _Shielded(io.FileIO):
    """A file that drops what cannot be written: its disk is full, or its reader has gone."""

    def write(self, data: bytes | memoryview) -> int:
        try:
            written = super().write(data)
        except OSError:
            written = None
        return memoryview(data).nbytes if written is None else written


def shield_streams() -> None:
    """Make it impossible that printing, a progress bar or a library's warning ends the run or its exit code.

    A standard descriptor that is closed is opened on /dev/null: a checkpoint must not get its number, and
    what some library prints.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:  # closed before the interpreter started
            setattr(sys, name, open(os.devnull, "w", errors="backslashreplace"))  # noqa: SIM115 (until the end)
        elif stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError):
                stream.flush()
            setattr(sys, name, _shielded(stream, number))


def _shielded(stream: TextIO, number: int) -> TextIO:
    file = _Shielded(number, "w", closefd=False)
    return io.TextIOWrapper(
        file if stream.write_through else io.BufferedWriter(file),  # python -u: each write at once
        stream.encoding,
        "backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
