"""Tests run with a fault in the code, each in a process forked from one that has imported torch."""

from __future__ import annotations

import compileall
import importlib
import importlib.util
import os
import py_compile
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .faults import Fault, planted

MEMORY = 8 * 2**30  # of a trial
POLL_SECONDS = 0.05
PRELOADED = (
    "torch",
    "torch.distributed",
    "torch.utils.tensorboard",
    "torchvision",
    "timm",
    "timm.data",
    "timm.optim",
    "timm.scheduler",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "safetensors.torch",
    "PIL.Image",
    "pytest",
)


class Trials:
    """A copy of the project in an empty folder, to plant faults in."""

    def __init__(self, root: Path, folder: Path):
        self._folder, self._root = folder, folder / "project"
        skipped = shutil.ignore_patterns(".git", "__pycache__", ".venv", "runs", "*_cache")
        shutil.copytree(root, self._root, ignore=skipped)
        # Compiled once, without a look at times: of the modules a trial compiles the changed one alone.
        compileall.compile_dir(self._root, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        for name in PRELOADED:
            importlib.import_module(name)

    def run(self, tests: Sequence[str], limit: float, fault: Fault | None = None) -> str:
        """What failed with the fault (or without any): a test's name, "time" after `limit` seconds, "" for nothing."""
        if fault is None:
            return self._run(tests, limit, keep=True)
        path = self._root / fault.module
        original, compiled = path.read_bytes(), Path(importlib.util.cache_from_source(str(path)))
        path.write_text(planted(fault, self._root))
        compiled.rename(compiled.with_suffix(".kept"))
        try:
            return self._run(tests, limit, keep=False)
        finally:
            path.write_bytes(original)
            compiled.with_suffix(".kept").rename(compiled)

    def _run(self, tests: Sequence[str], limit: float, keep: bool) -> str:
        """`keep` what pytest makes of the tests' own files, which do not change."""
        found = self._folder / "failed"
        found.write_text("")
        pid = os.fork()
        if pid == 0:
            os._exit(self._try(tests, limit, keep, found))
        # By looks rather than by the clock: a machine may be suspended.
        for _ in range(int(limit / POLL_SECONDS)):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return found.read_text() or ("" if status == 0 else "the end of the process")
            time.sleep(POLL_SECONDS)
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "time"

    def _try(self, tests: Sequence[str], limit: float, keep: bool, found: Path) -> int:
        """Run the tests in this process, which has to be a new one; 0 if all of them pass."""
        import pytest

        os.setsid()
        output = os.open(self._folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        os.environ["PYTHONDONTWRITEBYTECODE"] = "" if keep else "1"
        sys.dont_write_bytecode = not keep
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit) + 1, int(limit) + 2))
        # Nothing of the project itself: it is imported from the copy.
        here = str(Path(__file__).resolve().parents[2])
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(here):
                del sys.modules[name]
        sys.path[:] = [path for path in sys.path if path not in ("", here)]
        os.chdir(self._root)

        class First:
            """Writes down the first failure."""

            @staticmethod
            def pytest_runtest_logreport(report: pytest.TestReport) -> None:
                if report.failed and not found.read_text():
                    found.write_text(report.nodeid)

        scratch = f"--basetemp={self._folder / 'scratch'}"
        flags = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not cuda", scratch]
        return int(pytest.main([*flags, *(f"tests/test_{name}.py" for name in tests)], plugins=[First()]))
