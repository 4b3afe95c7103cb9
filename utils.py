"""What every other module may use: errors, processes, keyed randomness, durable writes, signals.

This module knows nothing of the rest of the project. Rank and world size are read from the environment here
and nowhere else; everything that puts a file on disk goes through `atomic_write`.
"""

import contextlib
import errno
import hashlib
import json
import multiprocessing
import operator
import os
import random
import re
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous


# ---------------------------------------------------------------------------------------------------- errors
class JobError(Exception):
    """An end of the run that is reported as one line, without a traceback; `exit_code` is the process's."""

    exit_code = 1


class UserError(JobError):
    """Something the user gave is wrong: the message names the file, flag or key and what to do (exit 2)."""

    exit_code = 2


class MachineError(JobError):
    """The machine cannot do what it is asked, such as a full or read-only disk (exit 3)."""

    exit_code = 3


class NonFiniteError(JobError):
    """A loss or gradient is not finite; nothing was updated (exit 4)."""

    exit_code = 4


class Interrupted(JobError):
    """The run ends because of a signal, after it saved (exit 128 + signum)."""

    def __init__(self, signum: int, note: str = ""):
        super().__init__(f"stopped by {signal.Signals(signum).name}" + (f": {note}" if note else ""))
        self.exit_code = 128 + signum


# ----------------------------------------------------------------------------------------- several processes
# How long a rank may let the others wait before the run is given up. Control messages may have to wait while
# the main rank downloads a dataset. A rank that *ends* is noticed at once, by the job guard.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
CONTROL_TIMEOUT = timedelta(minutes=60)
# Seconds a rank has to end by itself once another one has.
GRACE = 4.0
# The same while it writes a file, and after a signal, on which the ranks agree before the main one saves.
SAVE_GRACE = 300.0


class _JobGuard:
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
            server.settimeout(COLLECTIVE_TIMEOUT.total_seconds())
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
        while _unfinished and time.monotonic() < until:
            time.sleep(0.1)
        _exit_now(self.verdict)

    def wait_for_verdict(self, seconds: float) -> int | None:
        """The job's exit code if another rank has ended it, or ends it within `seconds`."""
        self._decided.wait(seconds)
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
        return lines.readline().decode().strip()
    except (OSError, ValueError):  # reset by the peer; closed here meanwhile
        return ""


def tell(text: str) -> None:
    """Write a line to stderr in one piece, so that lines of several ranks do not mix."""
    with contextlib.suppress(OSError):  # stderr has been closed: there is nobody to tell
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _exit_now(code: int) -> NoReturn:
    """Leave without the interpreter's teardown, which can hang on a collective whose peers have gone."""
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@dataclass
class _Job:
    guard: _JobGuard
    control: torch_dist.ProcessGroup


_job: _Job | None = None


@dataclass(frozen=True)
class Distributed:
    """This process's place in the job. The default is the only process there is.

    Every method must be called by all ranks. Control messages (`barrier`, `any`, `max`, the objects) travel
    over a gloo group of their own, so they never wait for the GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if _job is not None:
            torch_dist.barrier(group=_job.control)

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank."""
        return bool(self.max(int(flag)))

    def max(self, value: int) -> int:
        """The largest `value` of all ranks, such as the number of a signal that one of them got."""
        if _job is None:
            return value
        message = torch.tensor([value], dtype=torch.int64)
        torch_dist.all_reduce(message, torch_dist.ReduceOp.MAX, group=_job.control)
        return int(message)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over the ranks, as a new tensor; the argument is left alone."""
        if _job is None:
            return tensor.clone()
        total = tensor.detach().clone()
        torch_dist.all_reduce(total, group=_job.control if total.device.type == "cpu" else None)
        return total

    def broadcast_object(self, obj: Any) -> Any:
        """The main rank's `obj`, on every rank."""
        if _job is None:
            return obj
        box = [obj]
        torch_dist.broadcast_object_list(box, src=0, group=_job.control)
        return box[0]

    def gather_objects(self, obj: Any) -> list[Any]:
        """Every rank's `obj`, in the order of the ranks, on every rank."""
        if _job is None:
            return [obj]
        box = [None] * self.world_size
        torch_dist.all_gather_object(box, obj, group=_job.control)
        return box

    def wrap(self, model: nn.Module, sync_bn: bool = False, find_unused: bool = False) -> nn.Module:
        """`model` for data-parallel training; the model itself where there is one process."""
        if _job is None:
            return model
        if sync_bn and self.device.type == "cuda":  # torch has no synchronised batch norm on CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, find_unused_parameters=find_unused)


def init_distributed(device: str = "auto") -> Distributed:
    """Join the other processes of this job, if there are any.

    Understands what torchrun, `torch.distributed.launch --use_env` (RANK, WORLD_SIZE, LOCAL_RANK) and Slurm's
    srun (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID) leave in the environment.

    Args:
        device: "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N" (one process only).

    Raises:
        UserError: for a device that is not there, a broken environment, or processes that do not meet.
    """
    global _job
    rank, world_size, local_rank = _place()
    chosen = _choose_device(device, world_size, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size == 1:
        return Distributed(device=chosen)
    if _job is None:
        _set_rendezvous()
        _job = _join_job(rank, world_size, chosen)
    return Distributed(rank, world_size, local_rank, chosen)


def _join_job(rank: int, world_size: int, device: torch.device) -> _Job:
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        found, _, _ = next(rendezvous("env://", rank, world_size, timeout=COLLECTIVE_TIMEOUT))
        # torchrun's store outlives a restart of the group: without a prefix of their own, the new ranks would
        # find the addresses of those that died.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch_dist.PrefixStore(f"attempt {attempt} of {world_size}", found)
        torch_dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
        guard = _JobGuard(rank, world_size, store)
        return _Job(guard, torch_dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT))
    except (RuntimeError, OSError, ValueError) as error:  # gloo's own errors are plain RuntimeErrors
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"the {world_size} processes did not meet at {address}: {one_line(error)}") from error


def _place() -> tuple[int, int, int]:
    """(rank, world size, local rank) of this process as its launcher left them in the environment."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    elif "SLURM_PROCID" in os.environ:
        # The step's count, where Slurm gives it: a batch script's own shell is one task of a larger job.
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        names = ("SLURM_PROCID", tasks, "SLURM_LOCALID")
    else:
        return 0, 1, 0
    rank, world_size, local_rank = (
        _environment_int(name, fallback) for name, fallback in zip(names, (0, 1, 0), strict=True)
    )
    if not 0 <= rank < world_size:
        raise UserError(f"environment: {names[0]}={rank} is not below {names[1]}={world_size}")
    return rank, world_size, local_rank


def _environment_int(name: str, fallback: int) -> int:
    value = os.environ.get(name, str(fallback))
    if not re.fullmatch(r"\d{1,9}", value):
        raise UserError(f"environment: {name}={value!r} is not a number")
    return int(value)


def _set_rendezvous() -> None:
    """Say where rank 0 waits, if the launcher (Slurm) has not."""
    if "MASTER_ADDR" not in os.environ:
        lists = (os.environ.get(f"SLURM_{kind}NODELIST") for kind in ("STEP_", "JOB_", ""))
        os.environ["MASTER_ADDR"] = first_host(next(filter(None, lists), ""))
    if "MASTER_PORT" not in os.environ:
        job = _environment_int("SLURM_JOB_ID", 0) + 97 * _environment_int("SLURM_STEP_ID", 0)
        os.environ["MASTER_PORT"] = str(20000 + job % 20000)


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-07,11],cpu1` -> `gpu03`; "" -> this machine."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes).group()  # up to the first comma outside brackets
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first) or "127.0.0.1"


def _choose_device(name: str, world_size: int, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if match is None:
        raise UserError(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if match.group(1) and world_size > 1:
        raise UserError(f"--device {name}: with {world_size} processes each takes its own GPU; say cuda")
    # Slurm may show each task its own GPU alone (--gpus-per-task).
    alone = count == 1 and "SLURM_PROCID" in os.environ
    index = int(match.group(1) or (0 if alone else local_rank))
    if index >= count:
        raise UserError(f"--device {name}: GPU {index} is asked for, this machine has {count}")
    return torch.device("cuda", index)


def close_distributed() -> None:
    """Leave the job in good order; does nothing where there is none."""
    global _job
    if _job is not None:
        job, _job = _job, None
        job.guard.leave(0, "")
        torch_dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- command line
def one_line(error: BaseException | str) -> str:
    """The message of `error` on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def run_cli(main: Callable[[Sequence[str] | None], None]) -> NoReturn:
    """Run `main(None)` and end the process with the exit codes of this project.

    0 done, 2 the user's mistake, 3 the machine's, 4 a non-finite loss, 128 + n a signal, 1 a fault of the
    program (the only case with a traceback). With several processes each different error is reported once,
    and the other ranks end with the code of the one that failed.
    """
    global _job
    code, text = _outcome(main)
    if _job is None:
        # Before the ranks know one another they make the same mistakes: one of each machine reports them.
        if text and os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            tell(text)
        sys.exit(code)
    if code:
        _job.guard.leave(code, text)
        _exit_now(code)
    close_distributed()
    sys.exit(0)


def _outcome(main: Callable[[Sequence[str] | None], None]) -> tuple[int, str]:
    """(exit code, what to tell the user) of running `main`."""
    try:
        main(None)
    except JobError as error:
        return error.exit_code, f"error: {one_line(error)}"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "stopped by SIGINT"
    except SystemExit as leave:
        if isinstance(leave.code, str):
            return 1, leave.code
        return leave.code or 0, ""
    except Exception as error:
        # A collective that broke because another rank ended is that rank's to explain.
        if _job is not None and _is_lost_connection(error):
            verdict = _job.guard.wait_for_verdict(GRACE)
            if verdict is not None:
                return verdict, ""
        return 1, traceback.format_exc().rstrip()
    return 0, ""


def _is_lost_connection(error: Exception) -> bool:
    return isinstance(error, torch_dist.DistError) or (
        isinstance(error, RuntimeError) and re.search("gloo|nccl", str(error), re.IGNORECASE) is not None
    )


# ------------------------------------------------------------------------------------------ keyed randomness
def key_seed(*key: int | str) -> int:
    """A 63-bit seed for `key`, the same on every machine and in every process (1 and "1" differ)."""
    digest = hashlib.blake2b(digest_size=8)
    for part in key:
        text = f"s{part}" if isinstance(part, str) else f"i{operator.index(part)}"
        digest.update(f"{len(text.encode())}:{text}".encode())
    return int.from_bytes(digest.digest(), "big") >> 1


_SPARE = np.random.MT19937()


@contextlib.contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed python's, numpy's and torch's CPU generator from `key` in the block, and put them back after it.

    For everything a library draws from the global generators on behalf of one sample. A loader's worker has no
    other use for them and leaves them as they are.
    """
    if torch.utils.data.get_worker_info() is not None:
        _seed_generators(key_seed(*key))
        yield
        return
    python, numpy, cpu = random.getstate(), np.random.get_bit_generator(), torch.get_rng_state()
    # Another generator in numpy's place for a while: to copy its state and back takes half a millisecond.
    np.random.set_bit_generator(_SPARE if numpy is not _SPARE else np.random.MT19937())
    _seed_generators(key_seed(*key))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_bit_generator(numpy)
        torch.set_rng_state(cpu)


def _seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


def seed_step(*key: int | str) -> None:
    """Seed torch's generators, the GPUs' too, from `key`: for what a model draws in one step (drop path)."""
    seed = key_seed(*key)
    torch.default_generator.manual_seed(seed)
    # What torch.manual_seed does too, but for a GPU that nothing has used yet, which takes it long.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


# -------------------------------------------------------------------------------------------- durable writes
TEMPORARY_SUFFIX = ".tmp"
_unfinished: set[Path] = set()  # temporary files of this process


def atomic_write(path: str | os.PathLike, data: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Replace `path` by `data` so that a reader, a crash or a power cut finds the old or the new file, whole.

    Writes a temporary file beside it, then fsync, rename, and fsync of the directory.

    Args:
        path: the file; its directory must exist.
        data: what to write: bytes, text (UTF-8), or a function that writes to the open binary file.

    Raises:
        MachineError: when the file system refuses; the old file is then unchanged and no temporary is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    _unfinished.add(temporary)
    try:
        with open(temporary, "xb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # after the rename it is not there
            os.unlink(temporary)
        _unfinished.discard(temporary)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such thing
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: str | os.PathLike, error: OSError) -> MachineError:
    """The error to raise when writing `path` failed with `error`."""
    return MachineError(f"{os.fspath(path)}: cannot be written: {error.strerror or one_line(error)}")


def make_directory(path: str | os.PathLike) -> None:
    """Create the directory `path` and its parents, if they are not there.

    Raises:
        UserError: there is a file in its place.
        MachineError: when the file system refuses.
    """
    try:
        os.makedirs(path, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{os.fspath(path)}: cannot be a directory, a file is in its place") from error
    except OSError as error:
        raise cannot_write(path, error) from error


# --------------------------------------------------------------------------------------------------- signals
class StopSignals:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1 in `signum` (else None), and does nothing more about it.

    The run asks between steps, saves and raises `Interrupted(signum)`. Later signals are ignored, so that a
    second Ctrl-C does not spoil the save. `close()`, or the end of the `with` block, restores the handlers.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before = {
            number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        }

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        self.signum = self.signum or signum

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __enter__(self) -> "StopSignals":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
