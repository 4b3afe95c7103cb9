"""Peak memory of a contender, in a process of its own."""

import multiprocessing
import re
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from utils import UserError

from .contenders import Contender, Runner

MIB = 2**20


def peak_memory(contender: Contender, training: bool, threads: int) -> float:
    """MiB that building the model and two training steps, or inferences, add to a fresh process.

    On CUDA it is what PyTorch allocated at most.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak, args=(sender, contender, training, threads))
    child.start()
    sender.close()
    try:
        return receiver.recv() / MIB
    except EOFError:
        raise UserError(f"{contender.label}: the process that measures its memory died") from None
    finally:
        child.join()


def _send_peak(sender: Connection, contender: Contender, training: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    before = _resident_peak()
    runner = Runner(contender)
    run = runner.task("training" if training else "inference")
    run()
    run()
    on_device = contender.settings.device == "cuda"
    sender.send(torch.cuda.max_memory_allocated() if on_device else _resident_peak() - before)


def _resident_peak() -> int:
    """The most bytes this process has had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there includes the process this one was started by
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
