"""A directory has one run at a time, and none that died keeps it."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import utils
from runtime.lock import DirectoryLock
from utils import UserError

HOLDER = """
import sys, time, torch
from pathlib import Path
from runtime.lock import DirectoryLock

class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, i):
        time.sleep(0.01)
        return i

lock = DirectoryLock(Path(sys.argv[1]))
for _ in torch.utils.data.DataLoader(Numbers(), num_workers=2):
    print("held", flush=True)
"""


def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path):
    lock = DirectoryLock(tmp_path)
    told = rf"^{tmp_path}: another run holds it \(process {os.getpid()} on .+ since .+\); wait"
    for _ in range(2):
        with pytest.raises(UserError, match=told):
            DirectoryLock(tmp_path)
    lock.release()
    DirectoryLock(tmp_path).release()


def test_the_lock_of_a_killed_run_clears_though_its_workers_still_live(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(utils.__file__).parent)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on "):
        DirectoryLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    DirectoryLock(tmp_path).release()
    holder.stdout.close()


def test_a_deleted_lock_file_admits_nobody(tmp_path):
    lock = DirectoryLock(tmp_path)
    (tmp_path / ".lock").unlink()
    with pytest.raises(UserError, match="another run holds it .its .lock was deleted."):
        DirectoryLock(tmp_path)
    lock.release()
    DirectoryLock(tmp_path).release()


def refusing(monkeypatch, applies, error):
    """Let the file system refuse to lock what `applies` says of."""
    flock = fcntl.flock

    def refuse(descriptor, operation):
        if applies(stat.S_ISDIR(os.fstat(descriptor).st_mode)):
            raise OSError(error, os.strerror(error))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_file_system_that_locks_files_alone_still_admits_one(tmp_path, monkeypatch, capsys):
    refusing(monkeypatch, lambda is_directory: is_directory, errno.EBADF)
    lock = DirectoryLock(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        DirectoryLock(tmp_path)
    lock.release()
    assert capsys.readouterr().err == ""


def test_a_file_system_without_locks_is_told_and_used(tmp_path, monkeypatch, capsys):
    refusing(monkeypatch, lambda is_directory: True, errno.ENOLCK)
    locks = [DirectoryLock(tmp_path), DirectoryLock(tmp_path)]
    told = capsys.readouterr().err
    assert told.count("this file system has no locks (No locks available); see that no second run uses it") == 2
    for lock in locks:
        lock.release()
