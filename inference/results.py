"""Where results go: the JSON file, and folders that files are written to later."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils import UserError, atomic_write, cannot_write, make_directory


def check_output(path: Path) -> None:
    """Make sure that results can be written to `path` in the end.

    Raises:
        UserError: it is there and holds something else than results, or its folder is not there.
        MachineError: the file system refuses.
    """
    try:
        is_results = not path.exists() or "model_path" in json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        is_results = False
    if not is_results:
        raise UserError(f"--output {path}: it is there and holds no results of infer.py; name another file")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: there is no folder {path.parent}")
    _try_writing(path.parent)


def prepare_folder(path: Path) -> None:
    """Make a folder, if it is not there, that files can be written to; raises as `check_output`."""
    make_directory(path)
    _try_writing(path)


def _try_writing(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b" ")
    except OSError as error:
        raise cannot_write(folder, error) from error


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write `results`, which name their "model_path"; what JSON does not know is written as text."""
    atomic_write(path, json.dumps(results, indent=2, default=str) + "\n")
