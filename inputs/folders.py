"""Trees of class folders."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.images import ImageDataset, ImageFiles, divide_classes, is_image_name
from utils import UserError


def class_folders(options: DatasetOptions) -> ImageDataset:
    """Open a tree train/CLASS/IMAGE and val/CLASS/IMAGE; val may also be named validation, valid or test.

    With --val-split, the tree is train/CLASS/IMAGE or CLASS/IMAGE, and is split into training and validation.
    """
    if options.val_split is not None and options.split != "test":
        return _split(options)
    folder = split_folder(options.root, options.split_names)
    if folder is None:
        way_out = "; --val-split 0.1 holds out a part of each class for validation" if options.split != "test" else ""
        wanted = f"a folder {' or '.join(options.split_names)} that contains a folder of images for each class"
        raise options.missing(wanted + way_out)
    # Evaluation matches classes by name, and may lack some.
    return _image_folder(folder, split_folder(options.root, SPLIT_NAMES["val"]) if options.train else None)


def _split(options: DatasetOptions) -> ImageDataset:
    if (val := split_folder(options.root, SPLIT_NAMES["val"][:-1])) is not None:
        raise UserError(f"--val-split: {val} exists and is used for validation; remove the flag")
    images = _image_folder(split_folder(options.root, SPLIT_NAMES["train"]) or options.root, None)
    return validation_part(images, options)


def validation_part(images: ImageDataset, options: DatasetOptions) -> ImageDataset:
    """The part of each class that --val-split holds out, or the rest for training; neither is ever empty."""
    single = np.flatnonzero(np.bincount(images.labels) == 1)
    if len(single):
        raise UserError(f"--val-split: class {images.class_names[single[0]]} has a single image; it needs two")
    share, seed = options.val_split
    val_set, train_set = divide_classes(images, share, seed, "val-split", left=1)
    return train_set if options.train else val_set


def split_folder(root: Path, names: Sequence[str]) -> Path | None:
    """The first of the folders `names` in `root`."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _image_folder(folder: Path, other: Path | None) -> ImageDataset:
    """The images of `folder`, whose classes must be those of `other`, the folder of the other split."""
    classes = _class_names(folder)
    if not classes:
        raise UserError(f"{folder}: contains no class folders")
    if other is not None and (difference := set(classes) ^ set(_class_names(other))):
        named = ", ".join(sorted(difference)[:10])
        raise UserError(f"{folder} and {other} must contain the same classes; in only one of them: {named}")
    files = [list(walk_files(folder / name)) for name in classes]
    images = [[path for path in paths if is_image_name(path)] for paths in files]
    empty = [name for name, paths in zip(classes, images, strict=True) if not paths]
    if empty:
        raise UserError(f"{folder}: no images in the folder of class {', '.join(empty[:10])}")
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in images])
    dataset = ImageFiles([path for paths in images for path in paths], labels, classes)
    others = (path for paths in files for path in paths if not is_image_name(path))
    dataset.left_out = [f"{path} (not an image file name)" for path in others]
    return dataset


def walk_files(folder: str | os.PathLike) -> Iterator[str]:
    """Yield the files in and below a folder, except hidden ones, in the order of torchvision's `ImageFolder`.

    Links to folders are followed, but no folder is visited twice.
    """
    entered = {os.path.realpath(folder)}
    found = []
    for current, subfolders, names in os.walk(folder, followlinks=True):
        subfolders.sort()
        real = {name: os.path.realpath(os.path.join(current, name)) for name in subfolders}
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and real[name] not in entered]
        entered.update(real[name] for name in subfolders)
        found.append((current, sorted(name for name in names if not name.startswith("."))))
    for current, names in sorted(found):
        yield from (os.path.join(current, name) for name in names)
