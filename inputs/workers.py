"""How a loader's worker process begins and ends: signals are the main process's, and so is its end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess


def start_worker(_worker: int) -> None:
    """Leave signals to the main process: a whole job may get them at once, and it has to save first.

    SIGTERM is obeyed if the main process sends it. Where the system does not tell who does (macOS), the worker
    obeys any, but leaves the process group, so that what a terminal or a launcher sends to the group passes it by.
    """
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    tells_sender = hasattr(signal, "sigtimedwait")
    if not tells_sender:
        os.setpgid(0, 0)
    # The main process starts workers with SIGTERM blocked.
    signal.pthread_sigmask(signal.SIG_BLOCK if tells_sender else signal.SIG_UNBLOCK, {signal.SIGTERM})
    watch = _end_by_order if tells_sender else _end_with_parent
    threading.Thread(target=watch, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_by_order(parent: BaseProcess) -> None:
    """End this process when the main one says so by SIGTERM, or is gone; SIGTERM from others is ignored."""
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


def _end_with_parent(parent: BaseProcess) -> None:
    """End this process when the main one is gone."""
    while parent.is_alive():
        time.sleep(1.0)
    os._exit(0)
