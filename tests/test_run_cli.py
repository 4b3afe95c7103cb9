"""Exit codes of the scripts, and one-line error messages."""

import errno
import os
import signal
from pathlib import Path

import pytest
import torch

from runtime.cli import run_cli
from utils import Interrupted, MachineError, NonFiniteError, UserError

ROOT = Path(__file__).parent.parent


# ------------------------------------------------------------------------------------------------ exit codes
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("--lr x: not\na number"), 2, "error: --lr x: not a number"),
        (MachineError("log.txt: cannot be written"), 3, "error: log.txt: cannot be written"),
        (NonFiniteError("loss is nan"), 4, "error: loss is nan"),
        (Interrupted(signal.SIGTERM), 143, "error: stopped by SIGTERM"),
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


def allocate():
    torch.empty(2**60, dtype=torch.uint8)


def open_many():
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "image.png")


@pytest.mark.parametrize(("work", "message"), [(allocate, "out of memory: "), (open_many, "image.png")])
def test_a_machine_that_has_too_little_of_something_is_one_line_too(work, message, capsys):
    with pytest.raises(SystemExit) as leave:
        run_cli(lambda argv: work())
    said = capsys.readouterr().err
    assert leave.value.code == 3 and said.startswith("error: ") and said.count("\n") == 1 and message in said
