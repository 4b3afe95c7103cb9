"""Tar shards in webdataset's layout, on a local disk, read by position.

timm's reader streams them, in an order that depends on the number of workers and cannot be resumed. Read by
position, they are shuffled by key like any other data set.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from tarfile import TarInfo
from typing import BinaryIO

import numpy as np

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.images import BadImage, ImageDataset, class_number, count_classes, is_image_name
from utils import UserError, one_line


class TarImages(ImageDataset):
    """Images in uncompressed tar files."""

    def __init__(
        self,
        shards: Sequence[Path],
        members: Sequence[tuple[int, str, int, int]],
        labels: Sequence[int],
        class_names: Sequence[str],
    ):
        """members: (shard number, name, offset in bytes, size in bytes) of each image."""
        super().__init__(labels, class_names)
        self._shards = [str(shard) for shard in shards]
        self._names = np.array([os.fsencode(name) for _, name, _, _ in members])
        self._extents = np.array([(shard, offset, size) for shard, _, offset, size in members], dtype=np.int64)

    def path(self, index: int) -> str:
        return f"{self._shards[self._extents[index, 0]]}/{os.fsdecode(self._names[index])}"

    def source(self, index: int) -> BinaryIO:
        shard, offset, size = self._extents[index]
        try:
            with open(self._shards[shard], "rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))
        except OSError as error:
            raise BadImage(f"{self.path(index)}: {error.strerror}") from error


def web_shards(options: DatasetOptions) -> ImageDataset:
    """wds/NAME: KEY.jpg beside KEY.cls, or KEY.json with "label".

    The shards are those that _info.json names for the split, or NAME-train*.tar and NAME-val*.tar (without
    NAME: train*.tar and val*.tar).
    """
    own = _shards(options, options.split_names)
    if not own:
        raise options.missing(
            f"shards {_pattern(options.name, options.split)}, or _info.json naming "
            "them, on a disk (a remote stream cannot be read by position)"
        )
    members, labels, left_out = _index(own)
    other = _shards(options, SPLIT_NAMES["val" if options.train else "train"])
    all_labels = np.array(labels + _index(other)[1])
    dataset = TarImages(own, members, labels, [str(i) for i in range(count_classes(all_labels))])
    dataset.left_out = left_out
    return dataset


def _shards(options: DatasetOptions, splits: Sequence[str]) -> list[Path]:
    for info in (options.root / "_info.json", options.root / "info.json"):
        if info.is_file():
            try:
                named = options.read_json(info.name)["splits"]
                split = next((split for split in splits if split in named), None)
                return [options.root / file for file in named[split]["filenames"]] if split else []
            except (KeyError, TypeError) as error:
                raise UserError(f"{info}: it names no splits with filenames") from error
    found = (sorted(options.root.glob(_pattern(options.name, split))) for split in splits)
    return next(filter(None, found), [])


def _pattern(name: str, split: str) -> str:
    prefix = name.partition("/")[2]
    return f"{prefix}-{split}*.tar" if prefix else f"{split}*.tar"


def _index(shards: Sequence[Path]) -> tuple[list[tuple[int, str, int, int]], list[int], list[str]]:
    """The images of the shards as in `TarImages`, their labels, and what was left out."""
    members, labels, left_out = [], [], []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, mode="r:") as tar:
                images, targets, unused = _group_members(tar)
                members += [(number, image.name, image.offset_data, image.size) for image in images.values()]
                labels += [_label(tar, targets[key]) for key in images]
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: not a readable shard: {one_line(error)}") from error
        left_out += [f"{shard}/{reason}" for reason in unused]
    return members, labels, left_out


def _group_members(tar: tarfile.TarFile) -> tuple[dict[str, TarInfo], dict[str, TarInfo], list[str]]:
    """The image and the file with the label of each complete sample by its key, and why others are left out.

    A sample's key is a member's path without its last suffix: .cls, .json or an image's.
    """
    found: dict[str, dict[str, TarInfo]] = {"image": {}, ".cls": {}, ".json": {}}
    left_out = []
    for member in tar:
        key, suffix = os.path.splitext(member.name)
        kind = "image" if is_image_name(member.name) else suffix.lower()
        hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
        if kind not in found or hidden or not member.isfile():
            continue
        if found[kind].setdefault(key, member) is not member:
            left_out.append(f"{member.name} (a second one of sample {key})")
    images, labels = found["image"], found[".json"] | found[".cls"]
    left_out += [f"{member.name} (there is no .cls or .json)" for key, member in images.items() if key not in labels]
    left_out += [f"{member.name} (there is no image)" for key, member in labels.items() if key not in images]
    return {key: member for key, member in images.items() if key in labels}, labels, left_out


def _label(tar: tarfile.TarFile, member: TarInfo) -> int:
    """The class number in a .cls or .json file; raises ValueError."""
    try:
        content = json.loads(tar.extractfile(member).read())
        return class_number(content["label"] if member.name.lower().endswith(".json") else content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{member.name}: no label: {one_line(error)}") from error
