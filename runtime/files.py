"""Opening what may not be a file at all."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading; pipes and devices, which might block or never end, are not opened at all.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError as error:  # a name that none can have
        raise OSError(errno.EINVAL, str(error), path) from error
    if not stat.S_ISREG(mode):
        raise _not_regular(path)
    # Another one may have taken its place by now: not to wait for it.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise _not_regular(path)
    return file


def _not_regular(path: str | os.PathLike) -> OSError:
    return OSError(errno.EINVAL, "not a regular file", path)


def read_file(path: str | os.PathLike, longest: int) -> bytes:
    """The content of a file of at most `longest` bytes.

    Raises:
        OSError: it is something else than a file, larger, or cannot be read.
    """
    with open_file(path) as file:
        content = file.read(longest + 1)
    if len(content) > longest:
        raise OSError(errno.EFBIG, f"it has more than {longest:,} bytes", path)
    return content
