"""Shared settings of the test-suite: one thread a process, so that figures do not depend on the machine."""

import multiprocessing.process
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)

# `make test-fast` runs what is not listed there: every test that started no process and took no longer than this.
SLOW_TESTS = Path(__file__).with_name("slow_tests.txt")
FAST_SECONDS = 0.25
PROCESS_EVENTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}


def pytest_addoption(parser):
    parser.addoption("--measure-slow", action="store_true", help=f"write {SLOW_TESTS.name} anew, of a run with -n 0")


def pytest_configure(config):
    if config.getoption("--measure-slow"):
        config.pluginmanager.register(SlowTests(config))


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    slow = set(SLOW_TESTS.read_text().splitlines())
    for item in items:
        if "cuda" in item.keywords:
            if not torch.cuda.is_available():
                item.add_marker(skip)
        elif name_of(item) not in slow and item.path.parent == SLOW_TESTS.parent:
            item.add_marker("fast")


def name_of(item):
    """The test's file and function, without its parameters."""
    return f"{item.path.name}::{item.originalname}"


class SlowTests:
    """Which tests are slow, by what they do: those of this run are noted anew, the others of the list are kept."""

    def __init__(self, config):
        self.config = config
        self.ran, self.slow = set(), set()
        self.started = False
        sys.addaudithook(self._notice)
        start = multiprocessing.process.BaseProcess.start

        def noted(process):
            self.started = True
            return start(process)

        multiprocessing.process.BaseProcess.start = noted  # one started by "spawn" raises no audit event

    def _notice(self, event, _arguments):
        self.started = self.started or event in PROCESS_EVENTS

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.started, began = False, time.process_time()
        result = yield
        self.ran.add(name_of(item))
        if self.started or time.process_time() - began > FAST_SECONDS:
            self.slow.add(name_of(item))
        return result

    def pytest_sessionfinish(self):
        kept = set(SLOW_TESTS.read_text().splitlines()) - self.ran
        SLOW_TESTS.write_text("".join(f"{name}\n" for name in sorted(kept | self.slow)))
