"""What every module may use: errors, messages, keyed randomness, atomic writes, stop signals.

This module imports nothing of the project. Every file on the disk is written by `atomic_write`.
"""

import contextlib
import errno
import hashlib
import operator
import os
import random
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import BinaryIO, TextIO

import numpy as np
import torch


# ---------------------------------------------------------------------------------------------------- errors
class JobError(Exception):
    """An end of the run that is reported as one line, without a traceback; `exit_code` is the process's."""

    exit_code = 1


class UserError(JobError):
    """Something the user gave is wrong: the message names the file, flag or key and what to do (exit 2)."""

    exit_code = 2


class MachineError(JobError):
    """The machine cannot do what it is asked, such as a full or read-only disk (exit 3)."""

    exit_code = 3


class NonFiniteError(JobError):
    """A loss or gradient is not finite; nothing was updated (exit 4)."""

    exit_code = 4


class Interrupted(JobError):
    """The run ends because of a signal, after it saved (exit 128 + signum)."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


# -------------------------------------------------------------------------------------------------- messages
LONGEST_LINE = 5000  # characters
QUOTED = 80


def one_line(error: BaseException | str) -> str:
    """The message of `error` on one line, cut where it gets very long."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..."


def quote(value: object) -> str:
    """`repr(value)` for a message, cut where it gets long."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."


def printable(text: str) -> str:
    r"""`text` with an escape (`\x1b`) for each character that a terminal would obey or cannot show."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print one or more lines in one piece, so that lines of several processes do not mix.

    A full disk under the output, or a reader that has gone, never ends a run: the rest of the output is dropped.

    Args:
        text: without the last line's end; see `printable` for what becomes of names in it.
        stream: None is stdout.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # closed before the interpreter started
        return
    lines = "\n".join(printable(line.expandtabs()) for line in text.split("\n"))
    encoding = stream.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is closed
        stream.write(lines.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    flush(stream)


def flush(stream: TextIO | None) -> None:
    """Flush a standard stream; if it is broken, drop what is left, now and from now on.

    Otherwise the interpreter would fail to flush it when it ends, and change the exit code.
    """
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    except ValueError:  # it is closed
        pass


def tell(text: str) -> None:
    """`say` on stderr: errors, and remarks beside a program's results."""
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
    """Seed python's, numpy's and torch's CPU generator from `key` in the block, and put them back after it.

    For everything a library draws from the global generators on behalf of one sample. A loader's worker has no
    other use for them and leaves them as they are.
    """
    if torch.utils.data.get_worker_info() is not None:
        _seed_generators(key_seed(*key))
        yield
        return
    python, numpy, cpu = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    # Another generator in numpy's place for a while: to copy its state and back takes half a millisecond.
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
    """Seed torch's generators, the GPUs' too, from `key`: for what a model draws in one step (drop path)."""
    seed = key_seed(*key)
    torch.default_generator.manual_seed(seed)
    # What torch.manual_seed does too, but for a GPU that nothing has used yet, which takes it long.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


# -------------------------------------------------------------------------------------------- durable writes
TEMPORARY_SUFFIX = ".tmp"


def atomic_write(path: str | os.PathLike, data: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Replace `path` by `data` so that a reader, a crash or a power cut finds the old or the new file, whole.

    Writes a temporary file beside it, then fsync, rename, and fsync of the directory.

    Args:
        path: the file; its directory must exist.
        data: what to write: bytes, text (UTF-8; escapes for file names that are none), or a function that
            writes to the open binary file.

    Raises:
        MachineError: when the file system refuses; the old file is then unchanged and no temporary is left.
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
        sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename it is not there
            os.unlink(temporary)


def sync_directory(path: Path) -> None:
    """Write down on the disk which files a directory has."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: str | os.PathLike, error: OSError) -> MachineError:
    """The error to raise when writing `path` failed with `error`."""
    return MachineError(f"{os.fspath(path)}: cannot be written: {error.strerror or one_line(error)}")


def make_directory(path: str | os.PathLike) -> None:
    """Create the directory `path` and its parents, if they are not there.

    Raises:
        UserError: there is a file in its place.
        MachineError: when the file system refuses.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{os.fspath(path)}: cannot be a directory, a file is in its place") from error
    except OSError as error:
        raise cannot_write(path, error) from error


# --------------------------------------------------------------------------------------------------- signals
class StopSignals:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1 in `signum` (else None), and does nothing more about it.

    The run asks between steps, saves and raises `Interrupted(signum)`. Later signals are ignored, so that a
    second Ctrl-C does not spoil the save. The end of the `with` block restores the handlers.
    With `announced`, the first signal is answered at once in a line on stderr.
    """

    def __init__(self, announced: bool = False) -> None:
        self.signum: int | None = None
        self._announced = announced
        self._before = {
            number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None and self._announced:
            with contextlib.suppress(OSError):  # not by way of sys.stderr, which may be in the middle of a write
                os.write(2, b"\nfinishing this step, then saving\n")
        self.signum = self.signum or signum

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
