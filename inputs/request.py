"""What the command line asks of a data set, as each builder gets it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.files import open_file
from utils import UserError


@dataclass(frozen=True)
class Request:
    """name: --data-set; root: --data-path, None where it is not given (the data set can do without).

    train: the training split, else the one to validate on. download, inat_category, val_split: the flags.
    """

    name: str
    root: Path | None
    train: bool
    download: bool
    inat_category: str
    val_split: tuple[float, int] | None = None

    @property
    def split(self) -> str:
        return "train" if self.train else "val"

    def missing(self, expected: str) -> UserError:
        return UserError(f"--data-set {self.name} --data-path {self.root}: expected {expected}")

    def read_json(self, file: str) -> Any:
        """The content of a JSON file in the data set's folder; raises UserError."""
        path = self.root / file
        try:
            with open_file(path) as file:
                return json.load(file)
        except OSError as error:
            raise self.missing(f"{file} ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not readable as JSON: {error}") from error
