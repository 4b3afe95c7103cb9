"""Decoding images, and data sets whose images are files or arrays in memory."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from models.pretrained import describe_class, synonyms
from utils import UserError, key_seed, one_line

IMAGE_NAME = re.compile(
    r"\.(apng|avif|bmp|dib|gif|j2k|jfif|jp2|jpe|jpeg|jpg|pbm|pcx|pgm|png|pnm|ppm|tga|tif|tiff|webp)$", re.IGNORECASE
)
FEWEST_LEVELS = 64  # of 256: an image of more than 8 bits that keeps fewer is an error


class BadImage(UserError):
    """An image that cannot be read; the message names the file and the reason."""


def is_image_name(name: str) -> bool:
    """Whether a file's name has the suffix of a format that Pillow decodes."""
    return IMAGE_NAME.search(name) is not None


def read_image(
    source: str | os.PathLike | BinaryIO | Image.Image,
    name: str | None = None,
    upright: bool = False,
    channels: int = 3,
    pixel_range: Sequence[float] | None = None,
) -> Image.Image:
    """Decode an image file to 8 bits a channel: for RGB the pixels that torchvision's and timm's loaders give.

    The content decides the format, not the file's suffix.

    Args:
        source: a path, an open binary file, or an image in memory.
        name: what messages call it, the path by default.
        upright: turn the image as its EXIF orientation says. Data sets leave it as stored: the published
            accuracies and label maps were made that way. A photograph to be classified should be upright.
        channels: 1 for grey, 3 for RGB, 4 for RGB and alpha.
        pixel_range: the values that become black and white in images of more than 8 bits; 0 and 65,535 by default.

    Raises:
        BadImage: missing, not an image, truncated, larger than Pillow's limit, or an image of more than 8 bits that
            needs a `pixel_range`.
    """
    name = str(source) if name is None else name
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            image = _eight_bits(ImageOps.exif_transpose(image) if upright else image, pixel_range)
            return image if image.mode == mode else image.convert(mode)
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: cannot be read as an image: Pillow does not know its format") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise BadImage(f"{name}: cannot be read as an image: {one_line(error)}") from error


def _eight_bits(image: Image.Image, pixel_range: Sequence[float] | None) -> Image.Image:
    """The loaded image, its values scaled to 0..255 if they are not; raises ValueError if that loses most of them."""
    sixteen = image.mode.startswith("I;16")
    # Of 16-bit colour, whose raw mode is such as RGB;16B, Pillow reads the upper 8 bits.
    halved = not sixteen and any(re.search(";16[BLN]", str(tile[3])) for tile in getattr(image, "tile", ()))
    image.load()
    if not sixteen and image.mode not in ("I", "F"):
        if halved and 0 < np.asarray(image).max() < FEWEST_LEVELS:
            raise ValueError(f"fewer than {FEWEST_LEVELS} levels of its 16-bit colours remain in 8 bits; convert it")
        return image
    values = np.asarray(image).astype(np.float32)
    if pixel_range is None and not sixteen:
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range; --pixel-range MIN MAX gives one")
    low, high = pixel_range or (0, 65535)
    values = ((values - low) * (255 / (high - low))).clip(0, 255)
    if pixel_range is None and 0 < values.max() < FEWEST_LEVELS:
        raise ValueError("its values end far below 65535, as of 12 bits; --pixel-range MIN MAX gives their range")
    return Image.fromarray(np.rint(values).astype(np.uint8))


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

    def load(
        self, index: int, channels: int = 3, pixel_range: Sequence[float] | None = None
    ) -> tuple[Image.Image, int]:
        """The image, decoded by `read_image`, and its label; raises `BadImage`."""
        source, name = self.source(index), self.path(index)
        return read_image(source, name, channels=channels, pixel_range=pixel_range), int(self.labels[index])


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
