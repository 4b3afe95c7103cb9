"""Shared utilities: errors, messages, keyed randomness, atomic writes, stop signals.

This module imports no other module of the project.
"""

import contextlib
import hashlib
import operator
import os
import random
import secrets
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TextIO

import numpy as np
import torch


# ---------------------------------------------------------------------------------------------------- errors
class JobError(Exception):
    """An error reported as one line without a traceback; the process ends with `exit_code`."""

    exit_code = 1


class UserError(JobError):
    """Invalid input from the user; the message names the file, flag or key and the remedy (exit 2)."""

    exit_code = 2


class MachineError(JobError):
    """A failure of the machine, such as a full or read-only disk (exit 3)."""

    exit_code = 3


class NonFiniteError(JobError):
    """A loss or gradient is not finite; no weight was updated (exit 4)."""

    exit_code = 4


class Interrupted(JobError):
    """The run was stopped by a signal, after saving (exit 128 + signum)."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


# -------------------------------------------------------------------------------------------------- messages
LONGEST_LINE = 5000  # characters


def one_line(error: BaseException | str) -> str:
    """The message of `error` on one line, truncated if it is very long."""
    return textwrap.shorten(str(error), LONGEST_LINE, placeholder=" ...") or type(error).__name__


def say(text: str, stream: TextIO | None = None) -> None:
    """Print one or more lines on stdout, in a single write, so that the lines of several processes do not mix.

    Characters that the stream cannot encode are escaped. A full disk or a closed pipe never ends a run: the rest of the
    output is dropped.
    """
    stream = stream or sys.stdout
    encoding = stream.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    flush(stream)


def flush(stream: TextIO) -> None:
    """Flush a standard stream; if it is broken, redirect it to /dev/null.

    Otherwise the interpreter would fail to flush it at exit, and change the exit code.
    """
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except ValueError:  # it is closed
        pass


def tell(text: str) -> None:
    """Call `say` on stderr, for errors and remarks."""
    say(text, sys.stderr)


# ------------------------------------------------------------------------------------------ keyed randomness
def key_seed(*key: int | str) -> int:
    """A 63-bit seed for `key`, the same on every machine and in every process (1 and "1" differ)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        text = f"s{part}" if isinstance(part, str) else f"i{operator.index(part)}"
        digest.update(f"{len(text.encode())}:{text}".encode())
    return int.from_bytes(digest.digest(), "big") >> 1


_SPARE = np.random.MT19937()


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed the CPU generators of Python, NumPy and torch from `key` in the block, and restore them afterwards.

    Use it for libraries that draw from the global generators on behalf of one sample. Loader workers skip the
    restoring, because they do not use the generators otherwise.
    """
    if torch.utils.data.get_worker_info() is not None:
        _seed_generators(key_seed(*key))
        yield
        return
    python, numpy, cpu = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    # Replace NumPy's bit generator: copying its state back and forth takes half a millisecond.
    np.random.set_bit_generator(_SPARE if numpy is not _SPARE else np.random.MT19937())
    _seed_generators(key_seed(*key))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(numpy)
        torch.set_rng_state(cpu)


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_step(*key: int | str) -> None:
    """Seed torch's CPU and GPU generators from `key`, for the random draws of one step (drop path)."""
    seed = key_seed(*key)
    torch.default_generator.manual_seed(seed)
    # Like torch.manual_seed, but without its slow handling of GPUs that are not in use yet.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


# -------------------------------------------------------------------------------------------- durable writes
TEMPORARY_SUFFIX = ".tmp"


def atomic_write(path: str | os.PathLike, data: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Replace `path` by `data` atomically: readers see the complete old or new file, even after a crash.

    Writes a temporary file in the same directory, then calls fsync, rename, and fsync of the directory. `data` is
    bytes, text (written as UTF-8; undecodable file names are escaped), or a function that writes to the open file.

    Raises:
        MachineError: writing failed; the old file is unchanged, and the temporary file is removed.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        with contextlib.suppress(OSError):  # some network file systems do not support it
            os.fsync(directory)
        os.close(directory)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # it does not exist after the rename
            os.unlink(temporary)


def cannot_write(path: str | os.PathLike, error: OSError) -> MachineError:
    """The error to raise after writing `path` failed with `error`."""
    return MachineError(f"{os.fspath(path)}: cannot be written: {error.strerror or one_line(error)}")


def make_directory(path: str | os.PathLike) -> None:
    """Create the directory `path` and its parents; UserError if it is a file, MachineError if that fails otherwise."""
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{os.fspath(path)}: cannot be a directory, a file is in its place") from error
    except OSError as error:
        raise cannot_write(path, error) from error


# --------------------------------------------------------------------------------------------------- signals
class StopSignals:
    """Records the first SIGTERM, SIGINT or SIGUSR1 in `signum` (otherwise None).

    The run checks it between steps, saves and raises `Interrupted(signum)`. Later signals are ignored, so that a
    second Ctrl-C does not interrupt saving. The end of the `with` block restores the handlers.
    With `announced`, the first signal immediately prints a line on stderr.
    """

    def __init__(self, announced: bool = False) -> None:
        self.signum: int | None = None
        self._announced = announced
        self._before = {
            number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None and self._announced:
            with contextlib.suppress(OSError):  # not via sys.stderr, which may be in the middle of a write
                os.write(2, b"\nfinishing this step, then saving\n")
        self.signum = self.signum or signum

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
