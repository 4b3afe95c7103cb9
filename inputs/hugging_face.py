"""Hugging Face data sets, whose package has the name of this project's module `datasets`.

The package is imported while that module and its folder are hidden from Python. It prepares the data set; the
images are then read by position from its Arrow files, which pyarrow maps into memory.
"""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from inputs.dataset_options import DatasetOptions
from inputs.images import BadImage, ImageDataset, count_classes
from utils import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

PROJECT = Path(__file__).resolve().parent.parent
SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` leaves in the folder of a data set
_package: dict[str, ModuleType] = {}  # the modules of Hugging Face's package, between two uses


class ArrowImages(ImageDataset):
    """Images in a column of an Arrow table: structs of encoded bytes or a path."""

    def __init__(self, name: str, images: pyarrow.ChunkedArray, labels: np.ndarray, class_names: tuple[str, ...]):
        super().__init__(labels, class_names)
        self._name = name
        self._images = images

    def path(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def source(self, index: int) -> str | BinaryIO:
        stored = self._images[index].as_py() or {}
        if stored.get("bytes"):
            return io.BytesIO(stored["bytes"])
        if stored.get("path"):
            return stored["path"]
        raise BadImage(f"{self.path(index)}: there is no image in this row")


def hugging_face(options: DatasetOptions) -> ImageDataset:
    """hfds/NAME of the Hub, or hfds/PATH of a local folder, also one written by `save_to_disk`.

    The columns are `image` and `label`, or the only ones of their kinds. --data-path is where the package keeps
    what it downloads and prepares (default: its own cache); nothing is written into a local data set's folder.
    """
    try:
        with hugging_face_package() as package:
            parts = _open(package, options.name.partition("/")[2], options.root)
            split = next((split for split in options.split_names if split in parts), None)
            if split is None:
                wanted = " or ".join(options.split_names)
                raise UserError(f"no split {wanted}; it has {', '.join(map(str, parts))}")
            features, table = parts[split].features, parts[split].data.table
            image = _column(features, "image", package.Image)
            label = _column(features, "label", package.ClassLabel)
            if not isinstance(features[image], package.Image):
                raise UserError(f"column {image!r}: contains no images; make it an Image")
            labels = table.column(label).to_numpy()
            if table.column(label).null_count or not np.issubdtype(labels.dtype, np.integer):
                raise UserError(f"column {label!r}: not every row has a class number; make it a ClassLabel")
        named = tuple(getattr(features[label], "names", None) or ())
        class_names = named + tuple(str(i) for i in range(len(named), count_classes(labels)))
        return ArrowImages(f"{options.name}/{split}", table.column(image), labels, class_names)
    except Exception as error:  # a data set's builder raises anything
        raise UserError(f"--data-set {options.name}: {one_line(error)}") from error


@contextmanager
def hugging_face_package() -> Iterator[ModuleType]:
    """Hugging Face's `datasets`, under that name in `sys.modules` for the duration of the block."""
    project, path = _modules_of_datasets(), sys.path[:]
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != PROJECT]
    sys.modules.update(_package)
    try:
        yield importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise UserError("it needs Hugging Face's package: pip install datasets") from error
    finally:
        sys.path[:] = path
        _package.update(_modules_of_datasets())
        sys.modules.update(project)


def _modules_of_datasets() -> dict[str, ModuleType]:
    """The imported modules of that name, taken out of `sys.modules`."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "datasets"}


def _open(package: ModuleType, name: str, root: Path | None) -> dict[str, Any]:
    """The splits of a data set."""
    folder = Path(name).resolve()
    if any((folder / file).is_file() for file in SAVED):
        found = package.load_from_disk(name, keep_in_memory=False)
    else:
        inside = root is not None and folder.is_dir() and root.resolve().is_relative_to(folder)
        cache = None if root is None or inside else str(root)
        found = package.load_dataset(name, cache_dir=cache, keep_in_memory=False)
    return found if isinstance(found, dict) else {str(found.split or "train"): found}


def _column(features: dict, name: str, kind: type) -> str:
    """The column of that name, else the only one of that kind."""
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if name in features or len(fitting) == 1:
        return name if name in features else fitting[0]
    raise UserError(f"no column {name!r}, nor a single one of kind {kind.__name__}, among {', '.join(features)}")
