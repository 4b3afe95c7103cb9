"""Tar shards in webdataset's layout on a local disk.

timm streams shards, so its order depends on the number of workers and training cannot resume in the middle of an epoch.
Here, images are read at their positions in the files, and are shuffled like those of other data sets.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tarfile import TarInfo
from typing import BinaryIO

import numpy as np

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.images import BadImage, ImageDataset, ImageFiles, is_image_name
from utils import UserError, one_line


class TarImages(ImageFiles):
    """Images in uncompressed tar files."""

    def __init__(self, shards: Sequence[Path], positions: Sequence[tuple[int, int, int]], *files: Sequence):
        """positions: (shard number, offset, size in bytes) of each image. files: the arguments of `ImageFiles`."""
        super().__init__(*files)
        self._shards = shards
        self._positions = np.array(positions, dtype=np.int64)

    def source(self, index: int) -> BinaryIO:
        shard, offset, size = self._positions[index]
        try:
            with open(self._shards[shard], "rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))
        except OSError as error:
            raise BadImage(f"{self.path(index)}: {error.strerror}") from error


def web_shards(options: DatasetOptions) -> ImageDataset:
    """Open wds/NAME: the shards NAME-train*.tar and NAME-val*.tar, or train*.tar and val*.tar for wds/.

    A sample consists of an image, KEY.jpg or another format, and its class number in KEY.cls.
    """
    own = _shards(options, options.split_names)
    if not own:
        raise options.missing(f"shards {_pattern(options.name, options.split)} on a local disk")
    paths, positions, labels, left_out = _index(own)
    _, _, other_labels, _ = _index(_shards(options, SPLIT_NAMES["val" if options.train else "train"]))
    class_count = max(labels + other_labels, default=-1) + 1
    return TarImages(own, positions, paths, labels, [str(i) for i in range(class_count)], left_out)


def _shards(options: DatasetOptions, splits: Sequence[str]) -> list[Path]:
    """The shards of the first of the splits that exists."""
    found = (sorted(options.root.glob(_pattern(options.name, split))) for split in splits)
    return next(filter(None, found), [])


def _pattern(name: str, split: str) -> str:
    prefix = name.partition("/")[2]
    return f"{prefix}-{split}*.tar" if prefix else f"{split}*.tar"


def _index(shards: Sequence[Path]) -> tuple[list[str], list[tuple[int, int, int]], list[int], list[str]]:
    """The paths, positions and labels of the images as in `TarImages`, and the files that are left out."""
    paths, positions, labels, left_out = [], [], [], []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, mode="r:") as tar:
                images, classes, unused = _group_members(tar)
                for key in [key for key in images if key in classes]:
                    image = images.pop(key)
                    paths.append(f"{shard}/{image.name}")
                    positions.append((number, image.offset_data, image.size))
                    labels.append(_class_number(tar, classes.pop(key)))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: not a readable shard: {one_line(error)}") from error
        left_out += [f"{shard}/{member.name} (a second file of its sample)" for member in unused]
        left_out += [f"{shard}/{member.name} (there is no .cls file)" for member in images.values()]
        left_out += [f"{shard}/{member.name} (there is no image)" for member in classes.values()]
    return paths, positions, labels, left_out


def _group_members(tar: tarfile.TarFile) -> tuple[dict[str, TarInfo], dict[str, TarInfo], list[TarInfo]]:
    """The images and the .cls files by the sample's key, the path without its last suffix, and repeated files."""
    images, classes, repeated = {}, {}, []
    for member in tar:
        key, suffix = os.path.splitext(member.name)
        hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
        if member.isfile() and not hidden and (is_image_name(member.name) or suffix.lower() == ".cls"):
            group = images if is_image_name(member.name) else classes
            if group.setdefault(key, member) is not member:
                repeated.append(member)
    return images, classes, repeated


def _class_number(tar: tarfile.TarFile, member: TarInfo) -> int:
    text = tar.extractfile(member).read()
    if not text.strip().isdigit():
        raise ValueError(f"{member.name}: {text[:40]!r} is not a class number")
    return int(text)
