"""How a script ends: exit codes, one line for each error, and that a broken output changes nothing."""

import errno
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tiny_runs import TINY, rows

from runtime.cli import run_cli
from utils import Interrupted, MachineError, NonFiniteError, UserError, say, tell

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


@pytest.mark.parametrize(("work", "told"), [(allocate, "out of memory: "), (open_many, "image.png")])
def test_a_machine_that_has_too_little_of_something_is_one_line_too(work, told, capsys):
    with pytest.raises(SystemExit) as leave:
        run_cli(lambda argv: work())
    said = capsys.readouterr().err
    assert leave.value.code == 3 and said.startswith("error: ") and said.count("\n") == 1 and told in said


# ------------------------------------------------------------------------------------------- broken output
def full(number):
    os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def hung_up(number):
    reader, writer = os.pipe()
    os.dup2(writer, number)
    os.close(reader)
    os.close(writer)


def in_fork(work, spoil, streams):
    """The exit code of a script that does `work`, whose `streams` (0, 1, 2) were spoiled before it began."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        for number in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
        for number in streams:
            spoil(number)
        for number, name in ((1, "stdout"), (2, "stderr")):
            # What the interpreter makes of them when it starts.
            stream = None if spoil is os.close and number in streams else open(number, "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        try:
            run_cli(work)
        except SystemExit as leave:
            os._exit(leave.code)
    finally:
        os._exit(99)


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [full, hung_up, os.close])
@pytest.mark.parametrize("streams", [(1,), (2,), (0, 1, 2)])
def test_a_full_or_closed_output_ends_nothing_and_changes_no_exit_code(tmp_path, spoil, streams):
    def work(argv):
        for number in range(3):
            say(f"said {number}")
            tell("told")
            warnings.warn("of a library", stacklevel=1)
        (tmp_path / "written").write_text("x")
        assert os.open(tmp_path / "written", os.O_RDONLY) > 2  # no file of the run is where libraries print

    def fails(argv):
        work(argv)
        raise UserError("--lr")

    assert in_fork(work, spoil, streams) == 0
    assert in_fork(fails, spoil, streams) == 2
    assert (tmp_path / "written").read_text() == "x"


@pytest.mark.slow
def test_training_goes_on_when_its_output_cannot_be_written(tmp_path):
    words = [sys.executable, "main_spectformer.py", *TINY, "--epochs", "1", "--print-freq", "1"]
    with open("/dev/full", "wb") as nowhere:
        done = subprocess.run(
            [*words, "--output-dir", str(tmp_path)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=nowhere,
            stderr=nowhere,
            timeout=300,
        )
    assert done.returncode == 0 and len(rows(tmp_path)) == 1
    assert (tmp_path / "checkpoint_last.pth").exists()
