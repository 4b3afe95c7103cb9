"""The options that every data set builder receives."""

from dataclasses import dataclass
from pathlib import Path

from utils import UserError

# The names of the splits on disk, in order of preference. Without a val/ folder, test/ is used for validation.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "validation", "valid", "test"), "test": ("test",)}


@dataclass(frozen=True)
class DatasetOptions:
    """name is --data-set, root is --data-path (None without it), and split is train, val or test.

    The other fields are the flags of the same names.
    """

    name: str
    root: Path | None
    split: str
    download: bool = False
    inat_category: str = "name"
    val_split: tuple[float, int] | None = None
    val_path: str | None = None
    csv_columns: tuple[str, ...] = ("file", "label")

    @property
    def train(self) -> bool:
        return self.split == "train"

    @property
    def split_names(self) -> tuple[str, ...]:
        return SPLIT_NAMES[self.split]

    def missing(self, expected: str) -> UserError:
        return UserError(f"--data-set {self.name} --data-path {self.root}: expected {expected}")
