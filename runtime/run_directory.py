"""The directory of a run: its log, curves, TensorBoard events, arguments and checkpoints."""

import argparse
import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from runtime import checkpoints
from runtime.contents import COUNT
from runtime.curves import Plot, draw_curves
from runtime.files import read_file
from runtime.lineage import BEST, LOG, Lineage, begin, finish_moves, holds
from runtime.lock import LOCK, DirectoryLock
from runtime.processes import Distributed
from runtime.provenance import describe_run
from runtime.schema import Either, Fields, Number, Text, Typed, parse_json
from runtime.weights_and_biases import WeightsAndBiases
from utils import (
    TEMPORARY_SUFFIX,
    JobError,
    MachineError,
    UserError,
    atomic_write,
    cannot_write,
    make_directory,
    printable,
)

ARGS = "args.yaml"
MAX_LOG_BYTES = 2**26
ROW = Fields({"epoch": COUNT}, others=Either((Number(finite=False), Text(), Typed((bool,)))), required={"epoch"})


class RunDirectory:
    """A run's directory, held by one run at a time. Off the main rank every method does nothing.

    It knows the epoch of a row and of a checkpoint, and of all else no more than its arguments say.

    Args:
        path: the directory; it is made if it is not there, and goes again if nothing was written.
        dist: this process's place in the job.
        score: what checkpoints are ranked by, as their labels call it ("acc1").
        plots: the pictures to draw of the log.
        wandb: the project of Weights & Biases that the log goes to as well.

    Raises:
        UserError: another run holds it, or its log is none.
        MachineError: it cannot be made or written.
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
        self._made: list[Path] = []  # directories, the innermost first
        self._lock: DirectoryLock | None = None
        self._lineage: Lineage = ()
        self._rows: list[dict[str, Any]] = []
        self._events: SummaryWriter | None = None
        if self._active:
            self._made = [place for place in (self.path, *self.path.parents) if not os.path.exists(place)]
            make_directory(self.path)
            self._lock = DirectoryLock(self.path)
            try:
                self._remove_temporaries()
                finish_moves(self.path)
                self._rows = read_log(self.path / LOG)
            except JobError:
                self.close()
                raise

    def close(self) -> None:
        """Finish the events and give the directory back."""
        if self._events is not None:
            self._events.close()
            self._events = None
        if self._wandb is not None:
            self._wandb.close()
            self._wandb = None
        if self._lock is not None:
            self._remove_if_unused()
            self._lock.release()
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

    def _remove_if_unused(self) -> None:
        """Leave nothing of a run that ended before it wrote anything."""
        with contextlib.suppress(OSError):  # somebody else has written there meanwhile, or taken it away
            if self._made and os.listdir(self.path) == [LOCK]:
                (self.path / LOCK).unlink()
                for place in self._made:
                    place.rmdir()

    # --------------------------------------------------------------------------------------------- arguments
    def write_args(self, args: argparse.Namespace | Mapping[str, Any], argv: Sequence[str]) -> None:
        """Write args.yaml: the command (`argv`, like sys.argv), versions, the code's state, all arguments."""
        if not self._active:
            return
        values = args if isinstance(args, Mapping) else vars(args)
        record = describe_run(values, argv, self._processes)
        if self._project is not None and self._wandb is None:
            self._wandb = WeightsAndBiases(self._project, self.path, record["args"])
        atomic_write(self.path / ARGS, yaml.safe_dump(record, sort_keys=False, width=100, allow_unicode=True))

    # --------------------------------------------------------------------------------------------------- log
    def go_on_from(self, state: Mapping[str, Any] | None) -> None:
        """Begin the run from a checkpoint, or from nothing (None), before anything is written.

        Checkpoints that did not lead to it are set aside, as `runtime.lineage` says, and those of this run will
        record where they come from. The log keeps the epochs before the checkpoint's.

        Raises:
            MachineError: the disk refuses.
        """
        if not self._active:
            return
        self._lineage, past = begin(self.path, state)
        if past != self.path:
            self._rows = read_log(past / LOG)
        self.truncate_log(0 if state is None else state["epoch"])

    def truncate_log(self, epoch: int) -> None:
        """Forget the rows of `epoch` and later ones, which are about to be trained (again)."""
        if not self._active:
            return
        kept = {row["epoch"]: row for row in self._rows if row["epoch"] < epoch}
        rows = [kept[number] for number in sorted(kept)]
        if rows != self._rows:
            self._rows = rows
            self._write_log()

    def log_row(self, row: Mapping[str, Any], best_epoch: int | None = None) -> None:
        """Note the results of an epoch, `row["epoch"]`, in place of an earlier row of it; draw the plots anew.

        Args:
            row: numbers by column; those that end in `EMA` are drawn as the twins of the ones without.
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

    def _draw(self, plot: Plot, best_epoch: int | None) -> None:
        figure = draw_curves(self._rows, plot, best_epoch, printable(self.path.resolve().name))
        atomic_write(self.path / plot.file, lambda file: figure.savefig(file, format="png"))

    # ------------------------------------------------------------------------------------------- checkpoints
    def save_checkpoint(self, name: str, state: Mapping[str, Any]) -> None:
        """Write `state`, and where it comes from, to the file `name` (`checkpoint_last.pth`) of this directory.

        A state that was read from a checkpoint is not written over the file that it, or its equal, is in.
        """
        if self._active:
            self._save(self.path / name, state)

    def _save(self, path: Path, state: Mapping[str, Any], label: Mapping[str, float] | None = None) -> None:
        if "lineage" in state and holds(path, state):
            return
        lineage = {"lineage": [list(began) for began in self._lineage]} if self._lineage else {}
        checkpoints.save(path, {**state, **lineage}, label)

    def keep_best(self, state: Mapping[str, Any], score: float, k: int = 1) -> None:
        """Keep `state` if its `score`, the higher the better, is among the `k` best of the run up to now.

        `checkpoint_best.pth` is the best one; with k > 1 there is also a `checkpoint_best_NNNN.pth` for each
        of the best k, NNNN the epoch after which it was saved. Of two equal ones the earlier stays. An old file
        goes only once the new one is on disk.

        Args:
            state: a checkpoint; its "epoch" is the one to go on with.
            score: goes into the file's label.
            k: how many.
        """
        if not self._active:
            return
        epoch = state["epoch"]
        label = {self._score: score}
        best = self._kept_for(self.path / BEST, epoch)
        if best is None or score > best:
            self._save(self.path / BEST, state, label)
        if k > 1:
            found = sorted(self.path.glob("checkpoint_best_*.pth"))
            new = self.path / f"checkpoint_best_{epoch - 1:04d}.pth"
            kept = {path: self._kept_for(path, epoch) for path in found if path != new}
            ranked = sorted((path for path in kept if kept[path] is not None), key=kept.get, reverse=True)
            if len(ranked) < k or score > kept[ranked[k - 1]]:
                self._save(new, state, label)
                for path in ranked[k - 1 :]:
                    _remove(path)

    def _kept_for(self, path: Path, before: int) -> float | None:
        """The score that the file was kept for; None if it tells none, or is as late as the epoch `before`."""
        told = checkpoints.read_label(path)
        return told[self._score] if told is not None and self._score in told and told["epoch"] < before else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.txt, none if it is not there.

    Raises:
        UserError: it is no log.
    """
    try:
        lines = read_file(path, MAX_LOG_BYTES).splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: it is not a log ({error.strerror}); move it away to start a new one") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(parse_json(line))
        except ValueError:
            rows.append(None)
        if ROW.problem(rows[-1]):
            raise UserError(f"{path}: line {number} is not a row of a log; move the file away to start a new one")
    return rows


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(f"{path}: cannot be removed: {error.strerror}") from error
