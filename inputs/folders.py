"""Trees of class folders."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.images import ImageDataset, divide_classes, file_dataset, is_image_name
from utils import UserError


def class_folders(options: DatasetOptions) -> ImageDataset:
    """Open a tree train/CLASS/IMAGE and val/CLASS/IMAGE; val may also be named validation, valid or test.

    With --val-split, the tree is train/CLASS/IMAGE or CLASS/IMAGE, and is split into training and validation.
    """
    if options.val_split is not None and options.split != "test":
        if (val := split_folder(options.root, SPLIT_NAMES["val"][:-1])) is not None:
            raise UserError(f"--val-split: {val} exists and is used for validation; remove the flag")
        whole = _image_folder(split_folder(options.root, SPLIT_NAMES["train"]) or options.root)
        return validation_part(whole, options)
    folder = split_folder(options.root, options.split_names)
    if folder is None:
        way_out = "; --val-split 0.1 holds out a part of each class for validation" if options.split != "test" else ""
        wanted = f"a folder {' or '.join(options.split_names)} that contains a folder of images for each class"
        raise options.missing(wanted + way_out)
    return _image_folder(folder)


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


def _image_folder(folder: Path) -> ImageDataset:
    """The images in the class folders of `folder`."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise UserError(f"{folder}: contains no class folders")
    paths, labels, left_out = [], [], []
    for label, name in enumerate(classes):
        files = list(walk_files(folder / name))
        images = [path for path in files if is_image_name(path)]
        if not images:
            raise UserError(f"{folder}: no images in the folder of class {name}")
        paths += images
        labels += [label] * len(images)
        left_out += [f"{path} (not an image file name)" for path in files if not is_image_name(path)]
    return file_dataset(paths, labels, classes, left_out=left_out)


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
