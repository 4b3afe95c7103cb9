"""How an image is decoded: 8-bit RGB, or one line that says why not."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from runtime.files import open_file
from utils import UserError, one_line


class BadImage(UserError):
    """An image that cannot be read; the message names the file and the reason."""


def read_image(source: str | os.PathLike | BinaryIO, name: str | None = None, upright: bool = False) -> Image.Image:
    """Decode an image file to 8-bit RGB: the pixels that torchvision's and timm's loaders give.

    The content decides the format, not the file's extension. Alpha is dropped; 16-bit grey is scaled to 8
    bits (Pillow's own conversion, and hence those loaders, would clip it).

    Args:
        source: a path or an open binary file.
        name: what messages call it, the path by default.
        upright: turn the image as its EXIF orientation says. Data sets leave it as stored: the published
            accuracies and label maps were made that way. A photograph to be classified should be upright.

    Raises:
        BadImage: not a file, not an image, truncated, empty, of more pixels than Pillow's limit on decompression bombs,
            or of a kind without a defined range (32-bit integers, floats).
    """
    name = str(source) if name is None else name
    try:
        with (
            open_file(source) if isinstance(source, str | os.PathLike) else nullcontext(source) as file,
            Image.open(file) as image,
        ):
            if upright:
                image = ImageOps.exif_transpose(image)
            return _to_rgb(image)
    except UnidentifiedImageError as error:
        raise BadImage(f"{name}: cannot be read as an image: it is in no format that Pillow knows") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers stumble over
        raise BadImage(f"{name}: cannot be read as an image: {one_line(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        image.load()
        return image
    if image.mode.startswith("I;16"):
        eight_bits = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        return Image.fromarray(eight_bits).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} have no fixed range; convert it to 8 bits")
    return image.convert("RGB")
