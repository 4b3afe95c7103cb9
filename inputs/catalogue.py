"""The data sets by name, and what each requires of the command line and the augmentation."""

from __future__ import annotations

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
    """How a data set is built, and what it requires of the command line and the augmentation."""

    build: Callable[[DatasetOptions], ImageDataset]
    downloads: bool = False  # takes --download
    needs_path: bool = True  # --data-path must be given
    splits: bool = False  # takes --val-split
    test: bool = False  # a third split may be there
    table: bool = False  # --data-path is a file
    glyphs: bool = False  # mirrored, or cropped strongly, an image may be of another class


DATASETS: dict[str, DatasetSpec] = {
    "DIGITS": DatasetSpec(digits, needs_path=False, glyphs=True),
    "CIFAR10": DatasetSpec(cifar, downloads=True),
    "CIFAR100": DatasetSpec(cifar, downloads=True),
    "IMNET": DatasetSpec(class_folders, splits=True, test=True),
    "FOLDER": DatasetSpec(class_folders, splits=True, test=True),
    "FLOWERS": DatasetSpec(flowers, downloads=True),
    "CARS": DatasetSpec(cars),
    "PETS": DatasetSpec(pets, downloads=True),
    "INAT": DatasetSpec(inaturalist),
    "INAT19": DatasetSpec(inaturalist),
    "CSV": DatasetSpec(csv_table, splits=True, test=True, table=True),
    "hfds/": DatasetSpec(hugging_face, downloads=True, needs_path=False, test=True),
    "wds/": DatasetSpec(web_shards, test=True),
}


def dataset_spec(name: str) -> DatasetSpec:
    """The entry of `DATASETS` for a name as given to --data-set; raises UserError for an unknown one."""
    key = name.partition("/")[0] + "/" if "/" in name else name
    if key not in DATASETS:
        raise UserError(f"--data-set {name}: unknown; choose one of {', '.join(DATASETS)}")
    return DATASETS[key]


def build_dataset(
    name: str,
    root: str | os.PathLike | None,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    **options: Any,
) -> ImageDataset:
    """Open a data set.

    Args:
        name: a key of `DATASETS`, or ``hfds/…`` or ``wds/…``.
        root: its folder, --data-path; ``DIGITS`` needs none, for ``hfds/…`` it is the cache.
        split: "train", "val" (what training validates on), or "test".
        classes: keep only these, by name or number, labelled in this order.
        options: further fields of `DatasetOptions`.

    Raises:
        UserError: unknown name, missing or damaged files, an empty class, classes that differ between splits.
    """
    spec = dataset_spec(name)
    folder = None if root is None else Path(root)
    chosen = DatasetOptions(name, folder, split, **options)
    if folder is None and spec.needs_path:
        raise UserError(f"--data-set {name}: --data-path must say where its files are")
    if chosen.download and not spec.downloads:
        raise UserError(f"--download: --data-set {name} cannot be downloaded; put its files into --data-path")
    if chosen.val_split is not None and not spec.splits:
        raise UserError(f"--val-split: --data-set {name} has its own images to validate on; it is for FOLDER and CSV")
    if split == "test" and not spec.test:
        raise UserError(f"--split test: --data-set {name} has no third split; --split val is its test set")
    if chosen.val_path is not None and not spec.table:
        raise UserError(f"--val-path: --data-set {name} is no table; it is for CSV")
    if folder is not None and not (folder.is_file() if spec.table else folder.is_dir()) and not chosen.download:
        raise UserError(f"--data-path {folder}: no such {'file' if spec.table else 'folder'}")
    where = f"--data-set {name}" + (f" --data-path {folder}" if folder is not None else "")
    try:
        dataset = spec.build(chosen)
    except OSError as error:
        raise UserError(f"{where}: {one_line(error)}") from error
    if len(dataset) == 0:
        raise UserError(f"{where}: it contains no images")
    return dataset if classes is None else choose_classes(dataset, classes)
