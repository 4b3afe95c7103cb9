"""Log a run to Weights & Biases, in addition to the files of its directory."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import UserError, atomic_write, one_line

RUN_ID = "wandb_id.txt"  # the id that a resumed run continues


def start_wandb(project: str, directory: Path, settings: Mapping[str, Any]) -> Any:
    """Start the W&B run of a run directory, or continue it. Without an account or network, set `WANDB_MODE=offline`.

    Raises:
        UserError: the wandb package is not installed, or nobody is logged in.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--wandb {project} needs pip install wandb ({one_line(error)})") from error
    path = directory / RUN_ID
    known = path.read_text(encoding="utf-8").strip() if path.exists() else None
    name, config = directory.name, dict(settings)
    try:
        run = wandb.init(project=project, dir=directory, name=name, id=known, resume="allow", config=config)
    except wandb.errors.Error as error:
        raise UserError(f"--wandb {project}: {one_line(error)}") from error
    atomic_write(path, f"{run.id}\n")
    run.define_metric("*", step_metric="epoch")  # a repeated epoch is logged twice
    return run
