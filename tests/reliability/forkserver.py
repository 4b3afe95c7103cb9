"""A process that has imported the project once, and forks a child for each job it is sent.

Importing torch and timm takes seconds, a run of the tests one: so runs are forked from here. A child is what
a fresh process would be (its own session, standard streams, signal handlers and random states) and then runs
one function with the interpreter's ordinary exit. No thread may start here before a fork; `harness.Launcher`
is the other side.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import random
import select
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PRELOADED = (
    "numpy",
    "torch",
    "torch.utils.data",
    "torch.utils.tensorboard",
    "torch.distributed",
    "torchvision",
    "timm",
    "timm.data",
    "timm.optim",
    "timm.scheduler",
    "timm.utils",
    "matplotlib.pyplot",
    "sklearn.datasets",
    "yaml",
    "PIL.Image",
    "safetensors.torch",
    "main_detection",
    "main_spectformer",
    "main_svt",
    "main_transfer",
    "infer",
    "faults",
    "children",
)


@dataclass(frozen=True)
class Job:
    """One request: ``module:function`` and its arguments, and what the process is to look like."""

    function: str
    arguments: dict[str, Any]
    environment: dict[str, str]
    directory: str
    output: str

    def prepare(self) -> None:
        """Make the forked child as a fresh process would be."""
        import numpy as np
        import torch

        os.setsid()  # what a job leaves behind is found by its session
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.update(self.environment)
        os.chdir(self.directory)
        for descriptor, name, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, f"{self.output}.out", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, f"{self.output}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            opened = os.open(name, flags, 0o644)
            os.dup2(opened, descriptor)
            os.close(opened)
        # Inherited states would make every child draw alike, and hide a draw that nothing keyed.
        random.seed()
        np.random.seed()
        torch.seed()

    def run(self) -> None:
        module, function = self.function.split(":")
        getattr(importlib.import_module(module), function)(**self.arguments)


def send(message: dict[str, Any]) -> None:
    os.write(1, (json.dumps(message) + "\n").encode())


def serve() -> Job | None:
    """Fork a child for each line on standard input; the child returns its Job, the server None at the end."""
    wake, alarm = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(alarm, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    unread = b""
    while True:
        ready, _, _ = select.select([0, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            while children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                children.discard(pid)
                send({"pid": pid, "code": os.waitstatus_to_exitcode(status)})
        if 0 in ready:
            received = os.read(0, 1 << 16)
            if not received:
                for pid in children:
                    os.kill(pid, signal.SIGKILL)
                return None
            *lines, unread = (unread + received).split(b"\n")
            for line in lines:
                job = Job(**json.loads(line))
                pid = os.fork()
                if pid == 0:
                    os.close(wake)
                    os.close(alarm)
                    job.prepare()
                    return job
                children.add(pid)
                send({"started": pid})


if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here.parent.parent), str(here)]
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    send({"ready": os.getpid()})
    work = serve()
    if work is not None:
        work.run()
