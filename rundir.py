"""The directory of a run: who holds it, its log, curves, TensorBoard events, arguments and checkpoints."""

import argparse
import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.utils.tensorboard import SummaryWriter

import checkpointing
from utils import (
    TEMPORARY_SUFFIX,
    Distributed,
    MachineError,
    UserError,
    atomic_write,
    cannot_write,
    make_directory,
    tell,
)

LOCK, LOG, ARGS = ".lock", "log.txt", "args.yaml"
BEST = "checkpoint_best.pth"
PACKAGES = ("torch", "torchvision", "timm", "numpy")
# Curves: column of the log -> name in the legend. A column that no row has is left out.
LOSSES = {"train_loss": "training", "test_loss": "test", "test_ema_loss": "test, EMA"}
ACCURACIES = {"test_acc1": "top-1", "test_acc5": "top-5", "test_ema_acc1": "top-1, EMA", "test_ema_acc5": "top-5, EMA"}


class RunDirectory:
    """A run's directory, held by one run at a time. Off the main rank every method does nothing.

    Args:
        path: the directory; it is made if it is not there.
        dist: this process's place in the job.

    Raises:
        UserError: another run holds it.
        MachineError: it cannot be made or written.
    """

    def __init__(self, path: str | os.PathLike, dist: Distributed):
        self.path = Path(path)
        self._processes = dist.world_size
        self._active = dist.is_main
        self._lock: int | None = None
        self._rows: list[dict[str, Any]] = []
        self._events: SummaryWriter | None = None
        if self._active:
            make_directory(self.path)
            self._lock = _hold(self.path)
            self._remove_temporaries()
            try:
                self._rows = self._read_log()
            except UserError:
                self.close()
                raise

    def close(self) -> None:
        """Finish the events and give the directory back."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._lock is not None:
            _held.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _remove_temporaries(self) -> None:
        """What a run that was killed while it wrote has left; only the holder of the lock writes here."""
        for left in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):
                left.unlink()

    # --------------------------------------------------------------------------------------------- arguments
    def write_args(self, args: argparse.Namespace | Mapping[str, Any], argv: Sequence[str]) -> None:
        """Write args.yaml: the command (`argv`, like sys.argv), versions, the code's state, all arguments."""
        if not self._active:
            return
        values = args if isinstance(args, Mapping) else vars(args)
        record = {
            "command": shlex.join(["python", *argv]),
            "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            "processes": self._processes,
            "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
            "git": _git_state(),
            "args": {name: _yaml_value(value) for name, value in sorted(values.items())},
        }
        atomic_write(self.path / ARGS, yaml.safe_dump(record, sort_keys=False, width=100, allow_unicode=True))

    # --------------------------------------------------------------------------------------------------- log
    def _read_log(self) -> list[dict[str, Any]]:
        rows = []
        with contextlib.suppress(FileNotFoundError), open(self.path / LOG, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    rows.append({"epoch": int(json.loads(line)["epoch"])} | json.loads(line))
                except (ValueError, TypeError, KeyError):
                    raise UserError(
                        f"{self.path / LOG}: line {number} is not a row of a log; move the file away to start a new one"
                    ) from None
        return rows

    def truncate_log(self, epoch: int) -> None:
        """Forget the rows of `epoch` and later ones, which are about to be trained (again)."""
        if not self._active:
            return
        kept = [row for row in self._rows if row["epoch"] < epoch]
        if len(kept) < len(self._rows):
            self._rows = kept
            self._write_log()

    def log_row(self, row: Mapping[str, Any]) -> None:
        """Note the results of an epoch, `row["epoch"]`, in place of an earlier row of it; update the curves.

        Columns are those of `LOSSES` and `ACCURACIES` (percent) and any others.
        """
        if not self._active:
            return
        self._rows = [old for old in self._rows if old["epoch"] != row["epoch"]] + [dict(row)]
        self._rows.sort(key=lambda row: row["epoch"])
        self._write_log()
        self._write_events(row)
        self._draw("loss_plot.png", LOSSES, "Loss (nats)")
        self._draw("acc_plot.png", ACCURACIES, "Accuracy on the test images (%)")

    def _write_log(self) -> None:
        atomic_write(self.path / LOG, "".join(json.dumps(row) + "\n" for row in self._rows))

    def _write_events(self, row: Mapping[str, Any]) -> None:
        # TensorBoard's format is a growing stream, the one file here that is appended to. What a killed run
        # noted at or after this epoch is hidden by purge_step.
        try:
            if self._events is None:
                self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=row["epoch"])
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._events.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            self._events.flush()
        except OSError as error:
            raise cannot_write(self.path / "tensorboard", error) from error

    def _draw(self, name: str, columns: Mapping[str, str], label: str) -> None:
        figure = draw_curves(self._rows, columns, label)
        atomic_write(self.path / name, lambda file: figure.savefig(file, format="png"))

    # ------------------------------------------------------------------------------------------- checkpoints
    def save_checkpoint(self, name: str, state: Mapping[str, Any]) -> None:
        """Write `state` to the file `name` (`checkpoint_last.pth`) of this directory."""
        if self._active:
            checkpointing.save(self.path / name, state)

    def keep_best(self, state: Mapping[str, Any], acc1: float, k: int = 1) -> None:
        """Keep `state` if its accuracy `acc1` is among the `k` best of the run up to now.

        `checkpoint_best.pth` is the best one; with k > 1 there is also a `checkpoint_best_NNNN.pth` for each
        of the best k, NNNN the epoch after which it was saved. Of two equal ones the earlier stays. Files of
        epochs that are yet to come (the run went on from an earlier checkpoint) do not count. An old file
        goes only once the new one is on disk.

        Args:
            state: a checkpoint; its "epoch" is the one to go on with.
            acc1: percent.
            k: how many.
        """
        if not self._active:
            return
        epoch = state["epoch"]
        label = {"acc1": acc1}
        best = self._accuracy(self.path / BEST, epoch)
        if best is None or acc1 > best:
            checkpointing.save(self.path / BEST, state, label)
        if k > 1:
            found = sorted(self.path.glob("checkpoint_best_*.pth"))
            new = self.path / f"checkpoint_best_{epoch - 1:04d}.pth"
            kept = {path: self._accuracy(path, epoch) for path in found if path != new}
            ranked = sorted((path for path in kept if kept[path] is not None), key=kept.get, reverse=True)
            if len(ranked) < k or acc1 > kept[ranked[k - 1]]:
                checkpointing.save(new, state, label)
                for path in set(kept) - set(ranked[: k - 1]):
                    _remove(path)

    @staticmethod
    def _accuracy(path: Path, before: int) -> float | None:
        """The accuracy that the file was kept for; None if it tells none, or is as late as `before`."""
        told = checkpointing.read_label(path)
        return told["acc1"] if told is not None and "acc1" in told and told["epoch"] < before else None


# -------------------------------------------------------------------------------------------------- the lock
# Descriptors of locks that this process holds. A forked child (a data loader's worker) must not keep them:
# a lock lasts until the last copy of its descriptor is closed, and workers outlive a killed run by seconds.
_held: set[int] = set()


def _let_go_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go_in_child)


def _hold(directory: Path) -> int:
    """Take the directory's lock; the kernel gives it back when the process ends, however it does."""
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holder = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise UserError(
                f"{directory}: another run holds it ({holder or 'just starting'}); wait for that "
                "run, or choose another --output-dir"
            ) from None
        tell(f"{directory}: this file system has no locks ({error.strerror}); see that no second run uses it")
    _held.add(descriptor)
    holder = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
    try:
        # In place: the lock belongs to this very file, so it must not be replaced.
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
    except OSError as error:
        _held.discard(descriptor)
        os.close(descriptor)
        raise cannot_write(path, error) from error
    return descriptor


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"{path}: cannot be removed: {error.strerror}") from error


# ------------------------------------------------------------------------------------------------ the curves
def draw_curves(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], label: str) -> Figure:
    """Curves over the epochs: one for each of `columns` (name -> legend) that the rows have."""
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(xlabel="Epoch", ylabel=label)
    marker = "o" if len(rows) <= 30 else None
    for column, name in columns.items():
        points = [(row["epoch"], row[column]) for row in rows if row.get(column) is not None]
        if points:
            style = "--" if "_ema_" in column else "-"
            axes.plot(*zip(*points, strict=True), style, label=name, marker=marker, markersize=3.5)
    if len(rows) == 1:
        axes.set_xticks([rows[0]["epoch"]])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    return figure


# ---------------------------------------------------------------------------------------------- what was run
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Any] | None:
    """The commit of this code and whether it was changed since; None without git or a repository."""

    def git(*command: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *command],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _yaml_value(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _yaml_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_yaml_value(item) for item in value]
    return str(value)
