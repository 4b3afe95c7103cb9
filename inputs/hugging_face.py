"""Hugging Face data sets. The package `datasets` prepares them; images are read by row number."""

import importlib
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import BinaryIO

import numpy as np

from inputs.dataset_options import DatasetOptions
from inputs.images import BadImage, ImageDataset
from utils import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
SAVED = ("dataset_dict.json", "state.json")  # files that `save_to_disk` writes


def hugging_face(options: DatasetOptions) -> ImageDataset:
    """Open hfds/NAME from the Hub, or hfds/PATH, a local folder or one written by `save_to_disk`.

    The columns are `image` and `label`, or the only columns of these types. --data-path is the package's cache folder
    (default: the package's own); nothing is written to the folder of a local data set.
    """
    try:
        package = import_package()
    except ImportError as error:
        raise UserError(f"--data-set {options.name} needs Hugging Face's package: pip install datasets") from error
    ClassLabel, Image = package.ClassLabel, package.Image  # noqa: N806
    name, root = options.name.partition("/")[2], options.root
    folder = Path(name).resolve()
    try:
        if any((folder / file).is_file() for file in SAVED):
            found = package.load_from_disk(name)
        else:
            inside = root is not None and folder.is_dir() and root.resolve().is_relative_to(folder)
            found = package.load_dataset(name, cache_dir=None if root is None or inside else str(root))
        parts = found if isinstance(found, dict) else {str(found.split or "train"): found}
        split = next((split for split in options.split_names if split in parts), None)
        if split is None:
            raise UserError(f"no split {' or '.join(options.split_names)}; it has {', '.join(map(str, parts))}")
        rows, features = parts[split], parts[split].features
        image, label = _column(features, "image", Image), _column(features, "label", ClassLabel)
        labels = rows.data.column(label).to_numpy()
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"column {label!r}: not every row has a class number; cast it to ClassLabel")
        if labels.min(initial=0) < 0:
            raise UserError("some labels are negative: they are withheld in this split")
        class_names = getattr(features[label], "names", None) or map(str, range(labels.max(initial=-1) + 1))
        images = rows.select_columns([image]).cast_column(image, Image(decode=False))
    except Exception as error:  # builders may raise anything
        raise UserError(f"--data-set {options.name}: {one_line(error)}") from error

    def path(index: int) -> str:
        return f"{options.name}/{split}[{index}]"

    def source(index: int) -> str | BinaryIO:
        stored = images[index][image]  # not decoded: encoded bytes or a path
        if stored is None:
            raise BadImage(f"{path(index)}: no image in this row")
        return io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]

    return ImageDataset(labels, class_names, path, source)


def import_package() -> ModuleType:
    """Import Hugging Face's `datasets`, which this project's module of the same name shadows."""
    if not hasattr(sys.modules.get("datasets"), "load_dataset"):
        sys.modules.pop("datasets", None)
        path = sys.path
        sys.path = [entry for entry in path if Path(entry).resolve() != ROOT]
        try:
            importlib.import_module("datasets")
        finally:
            sys.path = path
    return sys.modules["datasets"]


def _column(features: dict, name: str, kind: type) -> str:
    """The column called `name`, else the only column of type `kind`."""
    fitting = [column for column, feature in features.items() if isinstance(feature, kind)]
    if name in features or len(fitting) == 1:
        return name if name in features else fitting[0]
    raise UserError(f"no column {name!r} and no single column of type {kind.__name__} among {', '.join(features)}")
