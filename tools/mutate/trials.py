"""Tests run with a fault in the code, each in a process forked from one that has imported torch."""

from __future__ import annotations

import compileall
import importlib
import importlib.util
import math
import os
import py_compile
import resource
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from utils import UserError

from .faults import Fault, planted

MEMORY = 8 * 2**30  # of a trial
POLL_SECONDS = 0.05
# A trial is ended after this many seconds, or this many times as many as usual: the processor's, and all.
MOST_BUSY, MOST_WAITING = (20, 5), (600, 20)
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
        self._folder, self.root = folder, folder / "project"
        self._usual: dict[str, list[float]] = {}  # seconds that a file of tests takes: the processor's, and all
        skipped = shutil.ignore_patterns(".git", "__pycache__", ".venv", "runs", "*_cache")
        shutil.copytree(root, self.root, ignore=skipped)
        # Compiled once, without a look at times: of the modules a trial compiles the changed one alone.
        compileall.compile_dir(self.root, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        for name in PRELOADED:
            importlib.import_module(name)

    def run(self, tests: Sequence[str], fault: Fault, likely: str = "") -> str:
        """What failed with the fault planted: a test's name, "time" after many times as long as usual, "" for nothing.

        Args:
            likely: the test to begin with; then come those marked as fast.

        Raises:
            UserError: the tests fail without it.
        """
        for name in tests:
            if name not in self._usual:
                failed, *self._usual[name] = self._run((name,), math.inf, math.inf)
                if failed:
                    raise UserError(f"without any fault, {failed} fails: see to it first")
        usual = [sum(seconds) for seconds in zip(*(self._usual[name] for name in tests), strict=True)]
        path = self.root / fault.module
        original, compiled = path.read_bytes(), Path(importlib.util.cache_from_source(str(path)))
        path.write_text(planted(fault, self.root))
        compiled.rename(compiled.with_suffix(".kept"))
        try:
            limits = zip((MOST_BUSY, MOST_WAITING), usual, strict=True)
            return self._run(tests, *(max(least, times * seconds) for (least, times), seconds in limits), likely)[0]
        finally:
            path.write_bytes(original)
            compiled.with_suffix(".kept").rename(compiled)

    def _run(
        self, tests: Sequence[str], processor_limit: float, limit: float, likely: str = ""
    ) -> tuple[str, float, float]:
        """(what failed, the processor's seconds, all seconds)."""
        found = self._folder / "failed"
        found.write_text("")
        pid = os.fork()
        if pid == 0:
            os._exit(self._try(tests, processor_limit, likely, found))
        looks = 0  # and not the clock: a machine may be suspended
        while looks * POLL_SECONDS < limit:
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                failed = found.read_text() or (_end(status) if status else "")
                return failed, usage.ru_utime + usage.ru_stime, looks * POLL_SECONDS
            time.sleep(POLL_SECONDS)
            looks += 1
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "time", 0.0, 0.0

    def _try(self, tests: Sequence[str], processor_limit: float, likely: str, found: Path) -> int:
        """Run the tests in this process, which has to be a new one; 0 if all of them pass."""
        import pytest

        os.setsid()
        output = os.open(self._folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        # What pytest makes of files of tests is kept, by the first run alone.
        os.environ["PYTHONDONTWRITEBYTECODE"] = "" if processor_limit == math.inf else "1"
        sys.dont_write_bytecode = processor_limit < math.inf
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if processor_limit < math.inf:
            resource.setrlimit(resource.RLIMIT_CPU, (int(processor_limit), int(processor_limit) + 1))
        # Nothing of the project itself: it is imported from the copy. Its environment (.venv) may lie in its folder.
        here = str(Path(__file__).resolve().parents[2])
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) or ""
            if file.startswith(here) and not file.startswith(sys.prefix):
                del sys.modules[name]
        sys.path[:] = [path for path in sys.path if path not in ("", here)]
        os.chdir(self.root)

        class First:
            """Begins with the tests that tell soonest, and writes down the first failure."""

            @staticmethod
            @pytest.hookimpl(trylast=True)  # the marks come first
            def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
                items.sort(key=lambda item: (item.nodeid != likely, "fast" not in item.keywords))

            @staticmethod
            def pytest_runtest_logreport(report: pytest.TestReport) -> None:
                if report.failed and not found.read_text():
                    found.write_text(report.nodeid)

            pytest_collectreport = pytest_runtest_logreport  # of a file that cannot be imported

        scratch = f"--basetemp={self._folder / 'scratch'}"
        flags = ["-x", "-q", "-n0", "-p", "no:cacheprovider", "-m", "not cuda", scratch]
        return int(pytest.main([*flags, *(f"tests/test_{name}.py" for name in tests)], plugins=[First()]))


def _end(status: int) -> str:
    """How a process ended without a word."""
    signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return "time" if signum == signal.SIGXCPU else f"the end of the process ({signum or os.WEXITSTATUS(status)})"
