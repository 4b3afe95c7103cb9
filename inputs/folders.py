"""Trees of class folders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from inputs.image_sets import ImageDataset, ImageFiles
from inputs.request import Request
from utils import UserError, key_seed

TRAIN_FOLDERS = ("train",)
VAL_FOLDERS = ("val", "validation", "valid", "test")


def class_folders(request: Request) -> ImageDataset:
    """Any tree train/CLASS/IMAGE and val/CLASS/IMAGE; validation, valid and test are taken for val.

    With --val-split, a tree train/CLASS/IMAGE or CLASS/IMAGE alone, of which one part or the other is taken.
    """
    if request.val_split is not None:
        return _split(request, *request.val_split)
    own, other = TRAIN_FOLDERS, VAL_FOLDERS
    if not request.train:
        own, other = other, own
    folder = _first_folder(request.root, own)
    if folder is None:
        raise request.missing(f"a folder {' or '.join(own)} with a folder of images for each class")
    return _image_folder(folder, _first_folder(request.root, other))


def _split(request: Request, share: float, seed: int) -> ImageDataset:
    """The images of each class that are trained on, or the share of them that is not; never none of either."""
    if (val := _first_folder(request.root, VAL_FOLDERS)) is not None:
        raise UserError(f"--val-split: {val} is there to validate on; leave the flag out")
    images = _image_folder(_first_folder(request.root, TRAIN_FOLDERS) or request.root, None)
    kept = []
    for label, name in enumerate(images.class_names):
        found = np.flatnonzero(images.labels == label)
        if len(found) < 2:
            raise UserError(f"--val-split: class {name} has a single image; it takes two")
        shuffled = np.random.default_rng(key_seed(seed, "val-split", name)).permutation(found)
        held_out = min(max(round(share * len(found)), 1), len(found) - 1)
        kept.append(shuffled[held_out:] if request.train else shuffled[:held_out])
    chosen = np.sort(np.concatenate(kept))
    return ImageFiles([images.path(i) for i in chosen], images.labels[chosen], images.class_names)


def has_class_folders(root: Path) -> bool:
    """Whether a folder of one of the splits is there."""
    return _first_folder(root, TRAIN_FOLDERS + VAL_FOLDERS) is not None


def _first_folder(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _image_folder(folder: Path, other: Path | None) -> ImageDataset:
    """The images of `folder`, whose classes must be those of `other`, the folder of the other split."""
    classes = _class_names(folder)
    if not classes:
        raise UserError(f"{folder}: no class folders in it")
    if other is not None and (difference := set(classes) ^ set(_class_names(other))):
        named = ", ".join(sorted(difference)[:10])
        raise UserError(f"{folder} and {other} have to hold the same classes; only in one of them: {named}")
    images = _images(folder, classes)
    empty = [name for name, paths in images.items() if not paths]
    if empty:
        raise UserError(
            f"{folder}: no images in the folder of class {', '.join(empty[:10])}; "
            f"files ending in {' '.join(IMG_EXTENSIONS)} count"
        )
    labels = np.repeat(np.arange(len(classes)), [len(paths) for paths in images.values()])
    return ImageFiles([path for paths in images.values() for path in paths], labels, classes)


def _images(folder: Path, classes: Sequence[str]) -> dict[str, list[str]]:
    """Each class's image files, in the order of `torchvision.datasets.ImageFolder`.

    Links to folders are followed, but no folder is entered twice, and none that holds this one or is another
    class: such a link would give images again, those of other classes and splits among them.
    """
    tops = {name: os.path.join(folder, name) for name in classes}
    entered = {_identity(path) for path in (folder, *folder.resolve().parents, *tops.values())}
    trees: dict[str, dict[str, list[str]]] = {name: {} for name in classes}
    links = [(name, link) for name, top in tops.items() for link in _walk(top, trees[name], entered)]
    while links:  # only now, when all that lies there without links has been entered
        links, found = [], sorted(links)
        for name, link in found:
            if _identity(link) not in entered:
                entered.add(_identity(link))
                links += [(name, further) for further in _walk(link, trees[name], entered)]
    return {
        name: [
            os.path.join(folder, file)
            for folder in sorted(tree)
            for file in sorted(tree[folder])
            if file.lower().endswith(IMG_EXTENSIONS)
        ]
        for name, tree in trees.items()
    }


def _walk(top: str, files: dict[str, list[str]], entered: set[tuple[int, int]]) -> list[str]:
    """Put the files of each folder in and below `top` into `files`; returns the links to folders met."""
    links = []
    for folder, subfolders, names in os.walk(top):
        files[folder] = names
        paths = {name: os.path.join(folder, name) for name in subfolders}
        links += [path for path in paths.values() if os.path.islink(path)]
        # os.walk goes into those that are left in its list and are no links.
        subfolders[:] = [
            name for name, path in paths.items() if not os.path.islink(path) and _identity(path) not in entered
        ]
        entered.update(_identity(paths[name]) for name in subfolders)
    return links


def _identity(folder: str | Path) -> tuple[int, int]:
    found = os.stat(folder)
    return found.st_dev, found.st_ino
