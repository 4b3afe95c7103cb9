"""One rank's end becomes every rank's, at once, and each error is told once."""

import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import BinaryIO, NoReturn

import torch.distributed as torch_dist

from utils import is_writing, tell

# How long the ranks may take to meet.
MEETING_TIMEOUT = timedelta(minutes=10)
# Seconds a rank has to end by itself once another one has.
GRACE = 4.0
# The same while it writes a file, and after a signal, on which the ranks agree before the main one saves.
SAVE_GRACE = 300.0
MAX_LINE = 2**20  # bytes of what one rank says to another


class JobGuard:
    """Ends every rank when one of them ends, whatever they are doing, and reports each error once.

    A collective notices a dead peer only while one is under way, and NCCL only after its timeout. So each
    rank keeps a TCP connection to rank 0, which the kernel closes with the process, however that dies. A
    rank that leaves says so first, as a JSON line `{"code": exit code, "text": what to tell the user}`.
    Rank 0 prints each different text once and passes the first non-zero code on as the job's verdict.
    """

    def __init__(self, rank: int, world_size: int, store: torch_dist.Store):
        self.rank = rank
        self.verdict: int | None = None
        self._decided = threading.Event()
        self._lock = threading.Lock()
        self._told: set[str] = set()
        self._leaving = False
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        if rank == 0:
            self._gather_peers(world_size, store)
        else:
            self._join_main_rank(store)

    def _gather_peers(self, world_size: int, store: torch_dist.Store) -> None:
        token = secrets.token_hex(16)
        # Dual-stack where the machine has it: the peers reach this host by whatever its name resolves to.
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=world_size) as server:
            store.set("job_guard", f"{token} {server.getsockname()[1]}")
            server.settimeout(MEETING_TIMEOUT.total_seconds())
            while len(self._connections) < world_size - 1:
                connection, _ = server.accept()
                connection.settimeout(5)
                lines = connection.makefile("rb")
                hello = _read_line(lines).split()
                if len(hello) != 2 or hello[0] != token:  # not one of this job
                    connection.close()
                    continue
                self._adopt(connection, self._watch_peer, connection, lines, int(hello[1]))

    def _join_main_rank(self, store: torch_dist.Store) -> None:
        token, port = store.get("job_guard").decode().split()
        connection = socket.create_connection((os.environ["MASTER_ADDR"], int(port)), timeout=60)
        connection.sendall(f"{token} {self.rank}\n".encode())
        self._adopt(connection, self._watch_main_rank, connection.makefile("rb"))

    def _adopt(self, connection: socket.socket, watch: Callable[..., None], *args: object) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a host that loses its power
        self._connections.append(connection)
        self._threads.append(threading.Thread(target=watch, args=args, daemon=True))
        self._threads[-1].start()

    def _watch_peer(self, connection: socket.socket, lines: BinaryIO, peer: int) -> None:
        words = _read_line(lines)
        if words:
            said = json.loads(words)
            self._record(said["code"], said["text"])
            if said["code"] <= 128:
                lines.close()
                connection.close()
        elif self.verdict is None:
            self._record(1, f"error: rank {peer} ended without a word (killed, or out of memory?)")

    def _watch_main_rank(self, lines: BinaryIO) -> None:
        words = _read_line(lines)
        if words:
            self._decide(int(words))
        elif not self._leaving:
            if self.rank == 1:
                tell("error: rank 0 ended without a word (killed, or out of memory?)")
            self._decide(1)

    def _record(self, code: int, text: str) -> None:
        with self._lock:
            new = bool(text) and text not in self._told
            self._told.add(text)
        if new:
            tell(text)
        if code:
            self._decide(code)

    def _decide(self, code: int) -> None:
        with self._lock:
            if self.verdict is not None:
                return
            self.verdict = code
        if self.rank == 0:
            self._pass_on(code)
        if code:
            threading.Thread(target=self._count_down, daemon=True).start()
        self._decided.set()

    def _pass_on(self, code: int) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):  # that peer has gone already
                connection.sendall(f"{code}\n".encode())

    def _count_down(self) -> None:
        time.sleep(_patience(self.verdict))
        until = time.monotonic() + SAVE_GRACE
        while is_writing() and time.monotonic() < until:
            time.sleep(0.1)
        exit_now(self.verdict)

    def wait_for_verdict(self) -> int | None:
        """The job's exit code if another rank has ended it, or does so soon."""
        self._decided.wait(GRACE)
        return self.verdict or None

    def leave(self, code: int, text: str) -> None:
        """Say the last word of this rank, and see to it that it is heard."""
        self._leaving = True
        # A signalled rank stays until rank 0 has saved: a launcher kills the others soon after one ends.
        deadline = time.monotonic() + (GRACE if self.rank == 0 else _patience(code))
        if self.rank == 0:
            self._record(code, text)
        else:
            with contextlib.suppress(OSError):  # rank 0 has gone; it cannot tell the user, so this rank does
                self._connections[0].sendall(json.dumps({"code": code, "text": text}).encode() + b"\n")
                self._connections[0].shutdown(socket.SHUT_WR)
                text = ""
            if text:
                tell(text)
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if self.rank == 0:
            self._decide(0)
        for connection in self._connections:
            connection.close()


def _patience(code: int) -> float:
    return SAVE_GRACE if code > 128 else GRACE


def _read_line(lines: BinaryIO) -> str:
    """The next line, or "" when the other end has gone."""
    try:
        return lines.readline(MAX_LINE).decode().strip()
    except (OSError, ValueError):  # reset by the peer; closed here meanwhile
        return ""


def exit_now(code: int) -> NoReturn:
    """Leave without the interpreter's teardown, which can hang on a collective whose peers have gone."""
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
