"""The directory of a run: its log, curves, TensorBoard events, arguments and checkpoints."""

import argparse
import contextlib
import json
import os
import shutil
from collections import ChainMap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import filelock
import yaml

from models.checkpoints import CheckpointError, peek
from runtime import checkpoints
from runtime.curves import Plot, draw_curves
from runtime.processes import Distributed
from runtime.provenance import describe_run
from runtime.weights_and_biases import WeightsAndBiases
from utils import (
    TEMPORARY_SUFFIX,
    JobError,
    MachineError,
    UserError,
    atomic_write,
    cannot_write,
    make_directory,
    one_line,
    printable,
)

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # without its package a run writes no events, as it draws no plots without matplotlib
    SummaryWriter = None

ARGS = "args.yaml"
LOG = "log.txt"
LOCK = ".lock"
BEST = "checkpoint_best.pth"
# Seconds to wait for the lock: the loader workers of a run that was killed keep it until they notice, 5 s later.
LOCK_PATIENCE = 10.0


class RunDirectory:
    """A run's directory, locked so that one run at a time writes there. Off the main rank every method does nothing.

    Args:
        path: the directory; created if missing.
        dist: this process's rank and the world size.
        score: the key of a checkpoint's score, by which the best are chosen ("acc1").
        plots: the plots to draw of the log.
        wandb: a project of Weights & Biases to log to as well.

    Raises:
        UserError: another run is using it, or its log cannot be read.
        MachineError: it cannot be created or written.
    """

    def __init__(
        self, path: str | os.PathLike, dist: Distributed, score: str, plots: Sequence[Plot], wandb: str | None = None
    ):
        self.path = Path(path)
        self._processes = dist.world_size
        self._active = dist.is_main
        self._score = score
        self._plots = plots
        self._project = wandb
        self._wandb: WeightsAndBiases | None = None
        self._lock: filelock.BaseFileLock | None = None
        self._rows: list[dict[str, Any]] = []
        self._events: Any = None
        if self._active:
            make_directory(self.path)
            self._lock = lock_directory(self.path)
            try:
                self._remove_temporaries()
                self._rows = read_log(self.path / LOG)
            except JobError:
                self.close()
                raise

    def close(self) -> None:
        """Close the event files and unlock the directory."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _remove_temporaries(self) -> None:
        """Remove what a run that was killed while writing has left; only the owner of the lock writes here."""
        for left in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
            with contextlib.suppress(OSError):
                left.unlink()

    # --------------------------------------------------------------------------------------------- arguments
    def write_args(
        self, args: argparse.Namespace | Mapping[str, Any], argv: Sequence[str], resuming: bool = False
    ) -> None:
        """Write args.yaml: the command (`argv`, like sys.argv), versions, the code's state, all arguments.

        A run that resumes keeps what its first command wrote, and adds its own command with the arguments it changes.
        """
        if not self._active:
            return
        values = args if isinstance(args, Mapping) else vars(args)
        record = describe_run(values, argv, self._processes)
        if self._project is not None and self._wandb is None:
            self._wandb = WeightsAndBiases(self._project, self.path, record["args"])
        if resuming and (self.path / ARGS).exists():
            first = yaml.safe_load((self.path / ARGS).read_text(encoding="utf-8"))
            later = first.setdefault("resumed", [])
            before = dict(ChainMap(*(entry["changed"] for entry in reversed(later)), first["args"]))
            changed = {name: value for name, value in record.pop("args").items() if before.get(name) != value}
            later.append(record | {"changed": changed})
            record = first
        atomic_write(self.path / ARGS, yaml.safe_dump(record, sort_keys=False, width=100, allow_unicode=True))

    # --------------------------------------------------------------------------------------------------- log
    def truncate_log(self, epoch: int) -> None:
        """Drop the rows of `epoch` and later ones, which are about to be trained (again)."""
        if not self._active:
            return
        kept = [row for row in self._rows if row["epoch"] < epoch]
        if kept != self._rows:
            self._rows = kept
            self._write_log()

    def log_row(self, row: Mapping[str, Any], best_epoch: int | None = None) -> None:
        """Log the results of epoch `row["epoch"]`, replacing an earlier row of it, and redraw the plots.

        Args:
            row: numbers by column; a column ending in `EMA` is drawn dashed beside the one without.
            best_epoch: the epoch to mark.
        """
        if not self._active:
            return
        self._rows = [old for old in self._rows if old["epoch"] != row["epoch"]] + [dict(row)]
        self._rows.sort(key=lambda row: row["epoch"])
        self._write_log()
        self._write_events(row)
        for plot in self._plots:
            self._draw(plot, best_epoch)
        if self._wandb is not None:
            self._wandb.log(row, [self.path / plot.file for plot in self._plots])

    def _write_log(self) -> None:
        atomic_write(self.path / LOG, "".join(json.dumps(row) + "\n" for row in self._rows))

    def _write_events(self, row: Mapping[str, Any]) -> None:
        if SummaryWriter is None:
            return
        # TensorBoard's format is the one file here that is appended to. purge_step hides what a killed run
        # wrote at or after this epoch.
        try:
            if self._events is None:
                self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=row["epoch"])
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._events.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            self._events.flush()
        except OSError as error:
            raise cannot_write(self.path / "tensorboard", error) from error

    def _draw(self, plot: Plot, best_epoch: int | None) -> None:
        if find_spec("matplotlib") is None:
            return
        figure = draw_curves(self._rows, plot, best_epoch, printable(self.path.resolve().name))
        atomic_write(self.path / plot.file, lambda file: figure.savefig(file, format="png"))

    # ------------------------------------------------------------------------------------------- checkpoints
    def save_checkpoints(self, names: Sequence[str], state: Mapping[str, Any]) -> None:
        """Write `state` to the first of `names` in this directory, and copy that file to the others, in order."""
        if not self._active:
            return
        first, *others = (self.path / name for name in names)
        checkpoints.save(first, state)
        for path in others:
            with open(first, "rb") as file:
                atomic_write(path, lambda copy, file=file: shutil.copyfileobj(file, copy))

    def names_for_best(self, state: Mapping[str, Any], k: int = 1) -> list[str]:
        """The names under which to save `state` if its score, the higher the better, is among the best `k` so far.

        `checkpoint_best.pth` is the best one; with k > 1 there is also a `checkpoint_best_NNNN.pth` for each of the
        best k, where NNNN is the epoch they were trained to. Of two equal ones the earlier stays.

        Args:
            state: a checkpoint, with its score under the key that this directory ranks by.
            k: how many to keep.
        """
        if not self._active:
            return []
        epoch, score = state["epoch"], state[self._score]
        best = self._score_of(self.path / BEST)
        names = [BEST] if best is None or score > best else []
        if k > 1:
            ranked = self._ranked()
            if len(ranked) < k or score > ranked[k - 1][0]:
                names.append(f"checkpoint_best_{epoch - 1:04d}.pth")
        return names

    def remove_worse(self, k: int) -> None:
        """Remove the `checkpoint_best_NNNN.pth` beyond the best `k`, once the newest is saved."""
        if self._active and k > 1:
            for _, path in self._ranked()[k:]:
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    raise MachineError(f"{path}: cannot be removed: {error.strerror}") from error

    def _ranked(self) -> list[tuple[float, Path]]:
        """The numbered best checkpoints, the best first, of equals the earliest."""
        paths = sorted(self.path.glob("checkpoint_best_*.pth"))
        scored = [(score, path) for path in paths if (score := self._score_of(path)) is not None]
        return sorted(scored, key=lambda found: -found[0])

    def _score_of(self, path: Path) -> float | None:
        """A checkpoint's score; None if it is missing or damaged."""
        try:
            return peek(path).get(self._score)
        except CheckpointError:
            return None


def lock_directory(directory: Path) -> filelock.BaseFileLock:
    """Lock a directory for this process; the operating system unlocks it when the process ends, however it does.

    Raises:
        UserError: another process has locked it.
        MachineError: the lock cannot be written.
    """
    lock = filelock.FileLock(directory / LOCK)
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except filelock.Timeout:
        raise UserError(
            f"{directory}: another run is using it; wait for that run, or choose another --output-dir"
        ) from None
    except OSError as error:
        raise cannot_write(directory / LOCK, error) from error
    return lock


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.txt; none if it does not exist.

    Raises:
        UserError: it is not a log.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return sorted((json.loads(line) for line in lines), key=lambda row: row["epoch"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a run's log ({one_line(error)}); move it away to start a new one") from error
