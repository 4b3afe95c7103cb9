"""Image decoding, and data sets of image files or arrays in memory."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageOps

from models.pretrained import describe_class, synonyms
from utils import UserError, key_seed, one_line

IMAGE_NAME = re.compile(
    r"\.(apng|avif|bmp|dib|gif|j2k|jfif|jp2|jpe|jpeg|jpg|pbm|pcx|pgm|png|pnm|ppm|tga|tif|tiff|webp)$", re.IGNORECASE
)
FEWEST_LEVELS = 64  # of 256; an image of more than 8 bits that keeps fewer levels is an error


class BadImage(UserError):
    """An unreadable image; the message names the file and the reason."""


def is_image_name(name: str) -> bool:
    """Whether a file name has the suffix of an image format that Pillow decodes."""
    return IMAGE_NAME.search(name) is not None


def read_image(
    source: str | os.PathLike | BinaryIO | Image.Image,
    name: str | None = None,
    upright: bool = False,
    channels: int = 3,
    pixel_range: Sequence[float] | None = None,
) -> Image.Image:
    """Decode an image to 8 bits per channel; RGB pixels are equal to those of torchvision's and timm's loaders.

    The format is detected from the content, not from the suffix.

    Args:
        source: a path, an open binary file, or an image in memory.
        name: the name in error messages, by default the path.
        upright: rotate the image by its EXIF orientation, for a photograph to classify. Data sets do not rotate
            images, because published accuracies and label maps were made without it.
        channels: 1 for grey, 3 for RGB, 4 for RGB and alpha.
        pixel_range: the values of black and white in images of more than 8 bits, by default 0 and 65,535.

    Raises:
        BadImage: the image is missing, truncated, larger than Pillow's limit, or not an image, or it has more than
            8 bits and needs a `pixel_range`.
    """
    name = str(source) if name is None else name
    try:
        with source if isinstance(source, Image.Image) else Image.open(source) as image:
            mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
            image = _eight_bits(ImageOps.exif_transpose(image) if upright else image, pixel_range)
            return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # Pillow's plugins may raise anything
        raise BadImage(f"{name}: cannot be read as an image: {one_line(error)}") from error


def _eight_bits(image: Image.Image, pixel_range: Sequence[float] | None) -> Image.Image:
    """Load the image and scale it to 0..255 if necessary; raises ValueError if that loses most levels."""
    sixteen = image.mode.startswith("I;16")
    image.load()
    if not sixteen and image.mode not in ("I", "F"):
        return image  # of 16-bit colours, Pillow reads only the upper 8 bits
    if pixel_range is None and not sixteen:
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range; set --pixel-range MIN MAX")
    low, high = pixel_range or (0, 65535)
    values = ((np.asarray(image).astype(np.float32) - low) * (255 / (high - low))).clip(0, 255)
    if pixel_range is None and 0 < values.max() < FEWEST_LEVELS:
        raise ValueError("its values end far below 65535, like 12-bit values; set --pixel-range MIN MAX")
    return Image.fromarray(np.rint(values).astype(np.uint8))


@dataclass(eq=False)
class ImageDataset:
    """A data set of images with one class label each.

    Attributes:
        labels: (N,) int64.
        class_names: the name of each label.
        path: returns the file of the image with an index, or another name if it has no file.
        source: returns the input for `read_image`; raises `BadImage`.
        left_out: files that are not used, each with the reason.
        upright: see `read_image`.
    """

    labels: Sequence[int] | np.ndarray
    class_names: Sequence[str]
    path: Callable[[int], str]
    source: Callable[[int], str | BinaryIO | Image.Image]
    left_out: Sequence[str] = ()
    upright: bool = False

    def __post_init__(self) -> None:
        self.labels = np.asarray(self.labels, dtype=np.int64)
        self.class_names = tuple(self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int, channels: int = 3, pixel_range: Sequence[float] | None = None) -> Image.Image:
        """The image, decoded by `read_image`; raises `BadImage`."""
        return read_image(self.source(index), self.path(index), self.upright, channels, pixel_range)

    def load(self, index: int, *decoding: Any) -> tuple[Image.Image, int]:
        """The image, decoded with the arguments of `image`, and its label; raises `BadImage`."""
        return self.image(index, *decoding), int(self.labels[index])

    def subset(self, indices: np.ndarray) -> "ImageDataset":
        """The images at the given indices."""

        def chosen(of: Callable) -> Callable:
            return lambda index: of(int(indices[index]))

        return replace(self, labels=self.labels[indices], path=chosen(self.path), source=chosen(self.source))


def file_dataset(
    paths: Sequence[str | os.PathLike], labels: Sequence[int], class_names: Sequence[str], **options: Any
) -> ImageDataset:
    """Images in files; `options` are left_out and upright."""
    encoded = np.array([os.fsencode(path) for path in paths])  # forked workers share it, unlike a million strings

    def path(index: int) -> str:
        return os.fsdecode(encoded[index])

    return ImageDataset(labels, class_names, path, path, **options)


def array_dataset(name: str, images: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> ImageDataset:
    """Images in memory, (N, H, W) or (N, H, W, 3) of uint8, named ``name[index]``."""
    return ImageDataset(labels, class_names, f"{name}[{{}}]".format, lambda index: Image.fromarray(images[index]))


def choose_classes(dataset: ImageDataset, classes: Sequence[str]) -> ImageDataset:
    """Select the images of some classes, by name or number, and label them 0, 1, … in the given order.

    Raises:
        UserError: a class is unknown or repeated.
    """
    chosen = [_class_number(dataset.class_names, name) for name in classes]
    if len(set(chosen)) != len(chosen):
        raise UserError(f"--classes {','.join(classes)}: a class is named twice")
    subset = dataset.subset(np.flatnonzero(np.isin(dataset.labels, chosen)))
    new_label = np.full(len(dataset.class_names), -1)
    new_label[chosen] = range(len(chosen))
    return replace(subset, labels=new_label[subset.labels], class_names=[dataset.class_names[old] for old in chosen])


def divide_classes(
    dataset: ImageDataset, share: float, *key: int | str, left: int = 0
) -> tuple[ImageDataset, ImageDataset]:
    """Split off a share of each class, at least one image, and leave at least `left` images of each class.

    The choice depends only on `key` and the name of the class.
    """
    chosen = np.zeros(len(dataset), dtype=bool)
    for label, name in enumerate(dataset.class_names):
        found = np.flatnonzero(dataset.labels == label)
        shuffled = np.random.default_rng(key_seed(*key, name)).permutation(found)
        chosen[shuffled[: min(max(round(share * len(found)), 1), len(found) - left)]] = True
    return dataset.subset(np.flatnonzero(chosen)), dataset.subset(np.flatnonzero(~chosen))


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
