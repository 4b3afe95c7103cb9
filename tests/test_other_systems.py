"""What only Linux has is not needed: macOS knows none of these names, and has no /proc."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINUX_ONLY = {
    "os": "sched_getaffinity sched_setaffinity posix_fadvise posix_fallocate eventfd eventfd_read eventfd_write "
    "memfd_create pidfd_open copy_file_range splice getrandom getxattr setxattr listxattr removexattr getresuid "
    "setresuid fdatasync O_DIRECT O_PATH O_TMPFILE O_NOATIME O_LARGEFILE O_RSYNC",
    "signal": "sigtimedwait sigwaitinfo pidfd_send_signal SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT SIGPOLL SIGCLD",
    "select": "epoll",
    "socket": "AF_NETLINK AF_PACKET SO_BINDTODEVICE SO_PASSCRED TCP_KEEPIDLE TCP_USER_TIMEOUT",
    "fcntl": "F_GETPIPE_SZ F_SETPIPE_SZ F_ADD_SEALS F_OFD_SETLK F_NOTIFY",
}
HIDE = """
import importlib, sys
for module, names in {names!r}.items():
    for name in names.split():
        if hasattr(importlib.import_module(module), name):
            delattr(importlib.import_module(module), name)
def no_proc(event, args):
    if event in ("open", "os.listdir", "os.scandir") and str(args[0]).startswith(("/proc", "/sys")):
        if sys._getframe(1).f_code.co_filename.startswith({root!r}):
            raise FileNotFoundError(args[0])
sys.addaudithook(no_proc)
"""
RUN = """
import pkgutil
from pathlib import Path
import runtime
for found in pkgutil.iter_modules(runtime.__path__):
    importlib.import_module(f"runtime.{found.name}")
import torch
from runtime.curves import Panel, Plot
from runtime.cli import run_cli
from runtime.checkpoints import newest_intact
from runtime.processes import init_distributed
from runtime.run_directory import RunDirectory
from utils import StopSignals, say

def main(argv):
    path = Path(sys.argv[1])
    plots = [Plot("plot.png", (Panel("Loss", {"loss": "loss"}),))]
    with StopSignals(), RunDirectory(path, init_distributed("cpu"), "score", plots) as run:
        run.write_args({}, [])
        run.log_row({"epoch": 0, "loss": 1.0}, 0)
        state = {"model": {"w": torch.ones(2)}, "epoch": 1, "step": 0}
        state["score"] = 1.0
        run.save_checkpoints([*run.names_for_best(state), "checkpoint_0001.pth", "checkpoint_last.pth"], state)
    with RunDirectory(path, init_distributed("cpu"), "score", plots) as run:
        run.truncate_log(newest_intact(path)[1]["epoch"])
    say("done")

run_cli(main)
"""


@pytest.mark.slow
def test_a_run_needs_nothing_that_only_linux_has(tmp_path):
    script = HIDE.format(names=LINUX_ONLY, root=str(ROOT)) + RUN
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert {"log.txt", "plot.png", "checkpoint_0001.pth"} <= {p.name for p in (tmp_path / "run").iterdir()}
