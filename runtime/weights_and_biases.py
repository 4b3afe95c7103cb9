"""Log a run to Weights & Biases, in addition to the files of its directory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils import UserError, atomic_write, one_line

RUN_ID = "wandb_id.txt"  # the id that a resumed run continues


class WeightsAndBiases:
    """A run of a project on W&B. Without an account or network, set `WANDB_MODE=offline` to log to the directory.

    Args:
        project: the name of the project; created if it does not exist.
        directory: the run directory; its name is the name of the run.
        settings: the settings of the run.

    Raises:
        UserError: the wandb package is not installed or reports an error.
    """

    def __init__(self, project: str, directory: Path, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError as error:
            raise UserError(f"--wandb {project} needs pip install wandb ({one_line(error)})") from error
        self._wandb = wandb
        path = directory / RUN_ID
        known = path.read_text(encoding="utf-8").strip() if path.exists() else None
        try:
            self._run = wandb.init(
                project=project, dir=directory, name=directory.name, id=known, resume="allow", config=dict(settings)
            )
        except (wandb.errors.Error, ValueError) as error:
            raise UserError(f"--wandb {project}: {one_line(error)}") from error
        if known is None:
            atomic_write(path, f"{self._run.id}\n")
        self._run.define_metric("*", step_metric="epoch")  # a repeated epoch is logged twice

    def log(self, row: Mapping[str, Any], plots: Iterable[Path]) -> None:
        """Log a row and the current plots."""
        self._run.log(dict(row) | {plot.stem: self._wandb.Image(str(plot)) for plot in plots})

    def close(self) -> None:
        self._run.finish()
