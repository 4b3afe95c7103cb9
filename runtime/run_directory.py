"""The directory of a run: its log, curves, TensorBoard events, arguments and checkpoints."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import yaml

from models.checkpoints import CheckpointError, peek
from models.pretrained import BEST
from runtime import checkpoints
from runtime.provenance import last_arguments, read_yaml
from runtime.weights_and_biases import start_wandb
from utils import TEMPORARY_SUFFIX, UserError, atomic_write, cannot_write, make_directory, one_line

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:  # the package is optional, like matplotlib for the plots
    SummaryWriter = None

# Stacked axes, with a curve for each column of the log that has values, and a dashed curve for its EMA column.
# Label of a vertical axis, with the unit -> column -> name in the legend.
Plot = Mapping[str, Mapping[str, str]]
ARGS = "args.yaml"
LOG = "log.txt"
LOCK = ".lock"
NUMBERED = "checkpoint_best_*.pth"
# Seconds to wait for the lock: loader workers of a killed run hold it until they notice, after 5 s.
LOCK_PATIENCE = 10.0


class RunDirectory:
    """A run's directory, locked against other runs. Only the main process of a job opens it.

    Args:
        path: the directory; created if missing.
        score: the key of the score in checkpoints that ranks them ("acc1").
        plots: the plots of the log, by file name.
        wandb: a Weights & Biases project to log to as well.

    Raises:
        UserError: another run is using it, or its log cannot be read.
        MachineError: it cannot be created or written.
    """

    def __init__(self, path: str | os.PathLike, score: str, plots: Mapping[str, Plot], wandb: str | None = None):
        self.path = Path(path)
        self._score, self._plots, self._project = score, plots, wandb
        self._wandb = self._events = None
        make_directory(self.path)
        with contextlib.ExitStack() as opened:
            try:
                opened.enter_context(filelock.FileLock(self.path / LOCK).acquire(timeout=LOCK_PATIENCE))
            except filelock.Timeout:
                raise UserError(
                    f"{self.path}: another run is using it; wait for that run, or choose another --output-dir"
                ) from None
            except OSError as error:
                raise cannot_write(self.path / LOCK, error) from error
            # Remove files that a run killed while writing has left; only the owner of the lock writes here.
            for left in self.path.glob(f".*{TEMPORARY_SUFFIX}"):
                left.unlink(missing_ok=True)
            self._rows = read_log(self.path / LOG)
            self._opened = opened.pop_all()

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close the event files and unlock the directory."""
        self._opened.close()

    def write_args(self, record: Mapping[str, Any], resuming: bool = False) -> None:
        """Write the result of `describe_run` to args.yaml.

        A run that resumes keeps the existing content, and adds its own command with the changed arguments.
        """
        if self._project is not None:
            self._wandb = start_wandb(self._project, self.path, record["args"])
            self._opened.callback(self._wandb.finish)
        if resuming and (self.path / ARGS).exists():
            first = read_yaml(self.path / ARGS, f"{self.path / ARGS}")
            before = last_arguments(first)
            now = {name: value for name, value in record.items() if name != "args"}
            now["changed"] = {name: value for name, value in record["args"].items() if before.get(name) != value}
            record = first | {"resumed": [*first.get("resumed", []), now]}
        atomic_write(self.path / ARGS, yaml.safe_dump(record, sort_keys=False, width=100, allow_unicode=True))

    def truncate_log(self, epoch: int) -> None:
        """Drop the rows of `epoch` and later epochs, which are about to be trained again."""
        kept = [row for row in self._rows if row["epoch"] < epoch]
        if kept != self._rows:
            self._rows = kept
            self._write_log()

    def log_row(self, row: Mapping[str, Any], best_epoch: int | None = None) -> None:
        """Log the results of an epoch (numbers by column), and redraw the plots with the best epoch marked."""
        self._rows.append(dict(row))
        self._write_log()
        self._write_events(row)
        for file, plot in self._plots.items():
            self._draw(file, plot, best_epoch)
        if self._wandb is not None:
            self._wandb.log(dict(row))

    def _write_log(self) -> None:
        atomic_write(self.path / LOG, "".join(json.dumps(row) + "\n" for row in self._rows))

    def _write_events(self, row: Mapping[str, Any]) -> None:
        if SummaryWriter is None:
            return
        # Only TensorBoard's file is appended to. purge_step hides what a killed run wrote at or after this epoch.
        try:
            if self._events is None:
                self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=row["epoch"])
                self._opened.callback(self._events.close)
            for name, value in row.items():
                if isinstance(value, (int, float)) and name != "epoch":
                    self._events.add_scalar(name.replace("_", "/", 1), value, row["epoch"])
            self._events.flush()
        except OSError as error:
            raise cannot_write(self.path / "tensorboard", error) from error

    def _draw(self, file: str, plot: Plot, best_epoch: int | None) -> None:
        try:
            from runtime.curves import draw_curves
        except ImportError:  # matplotlib is optional
            return
        figure = draw_curves(self._rows, plot, best_epoch, self.path.resolve().name)
        atomic_write(self.path / file, lambda opened: figure.savefig(opened, format="png"))

    def save_epoch(self, names: Sequence[str], state: Mapping[str, Any], keep_best: int = 1) -> None:
        """Write `state` at the end of an epoch to `names`, and to the best checkpoints if it is one of them.

        `checkpoint_best.pth` has the highest score. With keep_best > 1, each of the keep_best best checkpoints is also
        saved as `checkpoint_best_NNNN.pth`, where NNNN is its epoch. Among equal scores, the earlier one is kept.
        """
        best = []
        if all(state[self._score] > score for score, _ in self._ranked(BEST)):
            best.append(BEST)
        if keep_best > 1 and sum(score >= state[self._score] for score, _ in self._ranked(NUMBERED)) < keep_best:
            best.append(NUMBERED.replace("*", f"{state['epoch'] - 1:04d}"))
        first, *others = (self.path / name for name in (*best, *names))
        checkpoints.save(first, state)
        for path in others:  # copies: the state, perhaps on a GPU, is serialized once
            with open(first, "rb") as file:
                atomic_write(path, lambda copy, file=file: shutil.copyfileobj(file, copy))
        for _, path in self._ranked(NUMBERED)[keep_best:]:
            path.unlink(missing_ok=True)

    def _ranked(self, pattern: str) -> list[tuple[float, Path]]:
        """Scores and paths of the intact checkpoints that match, best first, among equals the earliest first."""
        scored = []
        for path in sorted(self.path.glob(pattern)):
            with contextlib.suppress(CheckpointError, KeyError):
                scored.append((peek(path)[self._score], path))
        return sorted(scored, key=lambda found: -found[0])


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
