"""A run's log on Weights & Biases, beside the files of its directory."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils import UserError, atomic_write, one_line

RUN_ID = "wandb_id.txt"  # by which a resumed run finds itself


class WeightsAndBiases:
    """One run of a project there. Without an account or a network, `WANDB_MODE=offline` keeps it in the directory.

    Args:
        project: its name there; it is made if it is not there.
        directory: the run's; its name is the run's name.
        settings: of the run, shown beside its curves.

    Raises:
        UserError: the package is not installed, or refuses.
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
        self._run.define_metric("*", step_metric="epoch")  # an epoch that is trained again comes twice

    def log(self, row: Mapping[str, Any], plots: Iterable[Path]) -> None:
        """A row of the log, and the pictures as they are now."""
        self._run.log(dict(row) | {plot.stem: self._wandb.Image(str(plot)) for plot in plots})

    def close(self) -> None:
        self._run.finish()
