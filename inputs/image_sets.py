"""What a data set is here, and those whose images lie in files or in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from inputs.images import read_image
from utils import UserError, key_seed

MAX_CLASSES = 1_000_000  # a label beyond it is damage; there is a name in memory for each


class NamedImages(Protocol):
    """So many images, each with a name: all that a loader and the label maps know of a data set."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> str:
        """The image's file, or what names it best."""


class ImageDataset(NamedImages, Protocol):
    """Images of one class each."""

    labels: np.ndarray
    class_names: tuple[str, ...]

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image as 8-bit RGB and its label; raises `BadImage`."""


class ImageFiles:
    """Images in files."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], class_names: Sequence[str]):
        # One block of bytes instead of a million strings: forked workers then share its memory.
        self._paths = np.array([os.fsencode(path) for path in paths])
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._paths)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return read_image(self.path(index)), int(self.labels[index])

    def path(self, index: int) -> str:
        return os.fsdecode(self._paths[index])


class ImageArrays:
    """Images in memory, (N, H, W) or (N, H, W, 3) of uint8."""

    def __init__(self, name: str, images: np.ndarray, labels: Sequence[int], class_names: Sequence[str]):
        self._name = name
        self._images = images
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._images)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._images[index]).convert("RGB"), int(self.labels[index])

    def path(self, index: int) -> str:
        return f"{self._name}[{index}]"


class Subset:
    """Some images of a data set, by their indices."""

    def __init__(self, dataset: ImageDataset, indices: np.ndarray):
        self._dataset = dataset
        self._indices = indices
        self.labels = dataset.labels[indices]
        self.class_names = dataset.class_names

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> tuple[Image.Image, int]:
        return self._dataset.load(int(self._indices[index]))[0], int(self.labels[index])

    def path(self, index: int) -> str:
        return self._dataset.path(int(self._indices[index]))


class ClassSubset(Subset):
    """The images of some classes of a data set, labelled 0, 1, … in the order of the classes given."""

    def __init__(self, dataset: ImageDataset, classes: Sequence[str]):
        """classes: names or numbers. Raises UserError for an unknown or a repeated one."""
        chosen = [_class_number(dataset.class_names, name) for name in classes]
        if len(set(chosen)) != len(chosen):
            raise UserError(f"--classes {','.join(classes)}: a class is named twice")
        super().__init__(dataset, np.flatnonzero(np.isin(dataset.labels, chosen)))
        new_label = np.full(len(dataset.class_names), -1)
        new_label[chosen] = range(len(chosen))
        self.labels = new_label[self.labels]
        self.class_names = tuple(dataset.class_names[old] for old in chosen)


class PartOfEachClass(Subset):
    """A share of each class's images, one at least; which of them depends on the seed alone."""

    def __init__(self, dataset: ImageDataset, share: float, seed: int):
        kept = []
        for label, name in enumerate(dataset.class_names):
            found = np.flatnonzero(dataset.labels == label)
            shuffled = np.random.default_rng(key_seed(seed, "train-part", name)).permutation(found)
            kept.append(shuffled[: max(round(share * len(found)), 1)])
        super().__init__(dataset, np.sort(np.concatenate(kept)))


def _class_number(class_names: Sequence[str], name: str) -> int:
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    shown = ", ".join(class_names[:10]) + (", …" if len(class_names) > 10 else "")
    raise UserError(f"--classes {name}: no such class; there are {len(class_names)}: {shown}")


def class_number(value: Any) -> int:
    """`value`, if it is the number of a class as a data set's files may hold it; else raises ValueError."""
    if type(value) is not int or not 0 <= value < MAX_CLASSES:
        raise ValueError(f"{repr(value)[:40]} is not the number of a class, from 0 to {MAX_CLASSES - 1}")
    return value


def count_classes(labels: np.ndarray) -> int:
    """The number of classes that labels count from 0.

    Raises:
        UserError: a label is negative, or larger than that of any class.
    """
    if labels.min(initial=0) < 0:
        raise UserError("some labels are negative: they are withheld in this split")
    count = int(labels.max(initial=-1)) + 1
    if count > MAX_CLASSES:
        raise UserError(f"its largest label is {count - 1}; there can be {MAX_CLASSES} classes")
    return count
