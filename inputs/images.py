"""Decoding images, and data sets whose images are files or arrays in memory."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.pretrained import describe_class, synonyms
from utils import UserError, key_seed, one_line

# Formats that Pillow identifies without being able to decode them everywhere: videos, documents, containers.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
Image.init()
IMAGE_SUFFIXES = tuple(
    sorted(
        suffix
        for suffix, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in _NOT_DECODED
    )
)


class BadImage(UserError):
    """An image that cannot be read; the message names the file and the reason."""


def is_image_name(name: str) -> bool:
    """Whether a file's name has the suffix of a format that Pillow decodes."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def read_image(
    source: str | os.PathLike | BinaryIO | Image.Image, name: str | None = None, upright: bool = False
) -> Image.Image:
    """Decode an image file to 8-bit RGB: the pixels that torchvision's and timm's loaders give.

    The content decides the format, not the file's suffix. Alpha is dropped; 16-bit grey is scaled to 8
    bits (Pillow's own conversion, and hence those loaders, would clip it).

    Args:
        source: a path, an open binary file, or an image in memory.
        name: what messages call it, the path by default.
        upright: turn the image as its EXIF orientation says. Data sets leave it as stored: the published
            accuracies and label maps were made that way. A photograph to be classified should be upright.

    Raises:
        BadImage: missing, not an image, truncated, larger than Pillow's limit, or of a kind without a fixed range
            (32-bit integers, floats).
    """
    name = str(source) if name is None else name
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            return _to_rgb(ImageOps.exif_transpose(image) if upright else image)
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: cannot be read as an image: Pillow does not know its format") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise BadImage(f"{name}: cannot be read as an image: {one_line(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        eight_bits = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        return Image.fromarray(eight_bits).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range; convert it to 8 bits")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


class ImageDataset(ABC):
    """Images with one class label each.

    Attributes:
        labels: (N,) int64.
        class_names: the name of each label.
        left_out: files beside the images that are not used, each with the reason.
    """

    left_out: Sequence[str] = ()

    def __init__(self, labels: Sequence[int], class_names: Sequence[str]):
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def path(self, index: int) -> str:
        """The image's file, or what names it best."""

    @abstractmethod
    def source(self, index: int) -> str | BinaryIO | Image.Image:
        """What `read_image` decodes; raises `BadImage`."""

    def load(self, index: int) -> tuple[Image.Image, int]:
        """The image as 8-bit RGB and its label; raises `BadImage`."""
        return read_image(self.source(index), self.path(index)), int(self.labels[index])


class ImageFiles(ImageDataset):
    """Images in files."""

    def __init__(self, paths: Sequence[str], labels: Sequence[int], class_names: Sequence[str]):
        super().__init__(labels, class_names)
        # One block of bytes instead of a million strings: forked workers then share its memory.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def path(self, index: int) -> str:
        return os.fsdecode(self._paths[index])

    source = path


class ImageArrays(ImageDataset):
    """Images in memory, (N, H, W) or (N, H, W, 3) of uint8."""

    def __init__(self, name: str, images: np.ndarray, labels: Sequence[int], class_names: Sequence[str]):
        super().__init__(labels, class_names)
        self._name = name
        self._images = images

    def path(self, index: int) -> str:
        return f"{self._name}[{index}]"

    def source(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index])


class Subset(ImageDataset):
    """Some images of a data set, by their indices."""

    def __init__(self, dataset: ImageDataset, indices: np.ndarray):
        super().__init__(dataset.labels[indices], dataset.class_names)
        self.left_out = dataset.left_out
        self._dataset = dataset
        self._indices = indices

    def path(self, index: int) -> str:
        return self._dataset.path(int(self._indices[index]))

    def source(self, index: int) -> str | BinaryIO | Image.Image:
        return self._dataset.source(int(self._indices[index]))


def choose_classes(dataset: ImageDataset, classes: Sequence[str]) -> Subset:
    """The images of some classes, by name or number, labelled 0, 1, … in the order of the classes given.

    Raises:
        UserError: an unknown or a repeated class.
    """
    chosen = [_class_number(dataset.class_names, name) for name in classes]
    if len(set(chosen)) != len(chosen):
        raise UserError(f"--classes {','.join(classes)}: a class is named twice")
    subset = Subset(dataset, np.flatnonzero(np.isin(dataset.labels, chosen)))
    new_label = np.full(len(dataset.class_names), -1)
    new_label[chosen] = range(len(chosen))
    subset.labels = new_label[subset.labels]
    subset.class_names = tuple(dataset.class_names[old] for old in chosen)
    return subset


def divide_classes(dataset: ImageDataset, share: float, *key: int | str, left: int = 0) -> tuple[Subset, Subset]:
    """A share of each class's images, at least one, and the rest, at least `left` of each class.

    The choice depends on `key` and the class's name alone.
    """
    parts: tuple[list, list] = ([], [])
    for label, name in enumerate(dataset.class_names):
        found = np.flatnonzero(dataset.labels == label)
        shuffled = np.random.default_rng(key_seed(*key, name)).permutation(found)
        count = min(max(round(share * len(found)), 1), len(found) - left)
        parts[0].append(shuffled[:count])
        parts[1].append(shuffled[count:])
    chosen, rest = (Subset(dataset, np.sort(np.concatenate(part))) for part in parts)
    return chosen, rest


def _class_number(class_names: Sequence[str], name: str) -> int:
    if name in class_names:
        return class_names.index(name)
    if name.isdecimal() and int(name) < len(class_names):
        return int(name)
    described = [i for i, known in enumerate(class_names) if name.casefold() in map(str.casefold, synonyms(known))]
    if len(described) == 1:
        return described[0]
    shown = ", ".join(map(describe_class, class_names[:10])) + (", …" if len(class_names) > 10 else "")
    raise UserError(f"--classes {name}: no such class; there are {len(class_names)}: {shown}")


def class_number(value: Any) -> int:
    """`value`, if it is the number of a class; else raises ValueError."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.40} is not the number of a class")
    return value


def count_classes(labels: np.ndarray) -> int:
    """The number of classes that labels count from 0; raises UserError for a negative one."""
    if labels.min(initial=0) < 0:
        raise UserError("some labels are negative: they are withheld in this split")
    return int(labels.max(initial=-1)) + 1
