"""The data sets by name, and the flags that each of them supports."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inputs.csv_table import csv_table
from inputs.dataset_options import DatasetOptions
from inputs.digits import digits
from inputs.folders import class_folders
from inputs.hugging_face import hugging_face
from inputs.images import ImageDataset, choose_classes
from inputs.inaturalist import inaturalist
from inputs.shards import web_shards
from inputs.torchvision_sets import cars, cifar, flowers, pets
from utils import UserError, one_line


@dataclass(frozen=True)
class DatasetSpec:
    """A data set: its builder, the optional flags that it supports, and whether it contains glyphs."""

    build: Callable[[DatasetOptions], ImageDataset]
    flags: str = ""  # which of --download, --val-split, --val-path and --split test it supports
    needs_path: bool = True  # --data-path is required
    glyphs: bool = False  # flips and strong crops may change an image's class


DATASETS: dict[str, DatasetSpec] = {
    "DIGITS": DatasetSpec(digits, needs_path=False, glyphs=True),
    "CIFAR10": DatasetSpec(cifar, "--download"),
    "CIFAR100": DatasetSpec(cifar, "--download"),
    "IMNET": DatasetSpec(class_folders, "--val-split --split test"),
    "FOLDER": DatasetSpec(class_folders, "--val-split --split test"),
    "FLOWERS": DatasetSpec(flowers, "--download"),
    "CARS": DatasetSpec(cars),
    "PETS": DatasetSpec(pets, "--download"),
    "INAT": DatasetSpec(inaturalist),
    "INAT19": DatasetSpec(inaturalist),
    "CSV": DatasetSpec(csv_table, "--val-split --val-path --split test"),
    "hfds/": DatasetSpec(hugging_face, "--download --split test", needs_path=False),
    "wds/": DatasetSpec(web_shards, "--split test"),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The entry of `DATASETS` for a --data-set name; raises UserError for an unknown name."""
    key = name.partition("/")[0] + "/" if "/" in name else name
    if key not in DATASETS:
        raise UserError(f"--data-set {name}: unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[key]


def build_dataset(
    name: str, root: str | os.PathLike | None, split: str, *, classes: Sequence[str] | None = None, **options: Any
) -> ImageDataset:
    """Open a data set.

    Args:
        name: a key of `DATASETS`, or ``hfds/…`` or ``wds/…``.
        root: its folder (--data-path). ``DIGITS`` needs none; for ``hfds/…`` it is the cache folder.
        split: "train", "val" (used for validation during training), or "test".
        classes: keep only these classes, by name or number, and label them in this order.
        options: other fields of `DatasetOptions`.

    Raises:
        UserError: unknown name, missing or damaged files, an empty class, classes that differ between splits.
    """
    spec = dataset_spec(name)
    folder = None if root is None else Path(root)
    chosen = DatasetOptions(name, folder, split, **options)
    if folder is None and spec.needs_path:
        raise UserError(f"--data-set {name}: needs --data-path, the folder of its files")
    asked = {"--download": chosen.download, "--val-split": chosen.val_split, "--val-path": chosen.val_path}
    for flag, value in (asked | {"--split test": split == "test"}).items():
        if value and flag not in spec.flags:
            others = ", ".join(other for other, spec in DATASETS.items() if flag in spec.flags)
            raise UserError(f"{flag}: --data-set {name} does not support it; these do: {others}")
    if folder is not None and not folder.exists() and not chosen.download:
        raise UserError(f"--data-path {folder}: no such file or folder")
    where = f"--data-set {name}" + (f" --data-path {folder}" if folder is not None else "")
    try:
        dataset = spec.build(chosen)
    except OSError as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    if len(dataset) == 0:
        reason = f"; {dataset.left_out[0]}" if dataset.left_out else ""
        raise UserError(f"{where}: contains no images{reason}")
    return dataset if classes is None else choose_classes(dataset, classes)
