"""One run at a time holds a directory, and none that died keeps it.

The kernel gives a lock back when its process ends, however it does. `filelock` would leave the most of this to be
written all the same: the holder's name, a lock that outlives its deleted file, file systems that have none.
"""

import contextlib
import fcntl
import os
import socket
import time
from pathlib import Path

from runtime.files import open_file
from utils import UserError, cannot_write, tell

LOCK = ".lock"

# Descriptors of locks that this process holds. A forked child (a data loader's worker) must not keep them:
# a lock lasts until the last copy of its descriptor is closed, and workers outlive a killed run by seconds.
_held: set[int] = set()


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


class DirectoryLock:
    """The lock of an existing directory, taken when this is made and kept until `release`.

    Two locks are taken: on the directory itself, which nobody can delete under a run, and on a file in it, for
    some network file systems lock files alone.

    Raises:
        UserError: another run holds it; the message says which.
        MachineError: it cannot be written.
    """

    def __init__(self, directory: Path):
        path = directory / LOCK
        self._descriptors: list[int] = []
        try:
            refusals = [self._take(directory, os.O_RDONLY), self._take(path, os.O_RDWR | os.O_CREAT)]
            holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
            # In place: the lock belongs to this very file, so it must not be replaced.
            os.ftruncate(self._descriptors[1], 0)
            os.pwrite(self._descriptors[1], holder.encode(), 0)
        except BlockingIOError:
            self.release()
            raise UserError(
                f"{directory}: another run holds it ({_holder(path)}); "
                "wait for that run, or choose another --output-dir"
            ) from None
        except OSError as error:
            self.release()
            raise cannot_write(path, error) from error
        if all(refusals):
            tell(f"{directory}: this file system has no locks ({refusals[0]}); see that no second run uses it")

    def _take(self, path: Path, flags: int) -> str:
        """Lock a file or directory; why the file system refuses to, or "". BlockingIOError: it is taken."""
        descriptor = os.open(path, flags, 0o666)
        self._descriptors.append(descriptor)
        _held.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except PermissionError as error:  # how some file systems say the same
            raise BlockingIOError from error
        except OSError as error:
            return error.strerror
        return ""

    def release(self) -> None:
        """Give the directory back."""
        for descriptor in _held.intersection(self._descriptors):
            _held.discard(descriptor)
            os.close(descriptor)
        self._descriptors.clear()


def _holder(path: Path) -> str:
    """Who wrote the file of the lock."""
    with contextlib.suppress(OSError), open_file(path) as file:
        return file.read(1000).decode(errors="replace").strip() or "just starting"
    return "its .lock was deleted"
