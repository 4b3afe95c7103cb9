"""Tar shards in webdataset's layout on a local disk.

timm streams shards, so its order depends on the number of workers and training cannot resume in the middle of an epoch.
Here, images are read at their positions in the files, and are shuffled like those of other data sets.
"""

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.images import BadImage, ImageDataset, class_number, is_image_name
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
    """Open wds/NAME, shards with an image KEY.jpg and a label, KEY.cls or "label" in KEY.json, for each sample.

    The shards are the files that _info.json lists for the split, or NAME-train*.tar and NAME-val*.tar (train*.tar and
    val*.tar without NAME).
    """
    own = _shards(options, options.split_names)
    if not own:
        raise options.missing(
            f"shards {_pattern(options.name, options.split)} on a local disk, or an _info.json that lists them"
        )
    members, labels, left_out = _index(own)
    _, other_labels, _ = _index(_shards(options, SPLIT_NAMES["val" if options.train else "train"]))
    class_count = max(labels + other_labels, default=-1) + 1
    dataset = TarImages(own, members, labels, [str(i) for i in range(class_count)])
    dataset.left_out = left_out
    return dataset


def _shards(options: DatasetOptions, splits: Sequence[str]) -> list[Path]:
    """The shards of the first of the splits that exists."""
    if (options.root / "_info.json").is_file():
        listed = options.read_json("_info.json")
        try:
            files = {split: listed["splits"][split]["filenames"] for split in splits if split in listed["splits"]}
        except (KeyError, TypeError) as error:
            raise options.missing('{"splits": {SPLIT: {"filenames": [...]}}} in _info.json') from error
        return [options.root / file for file in next(iter(files.values()), [])]
    found = (sorted(options.root.glob(_pattern(options.name, split))) for split in splits)
    return next(filter(None, found), [])


def _pattern(name: str, split: str) -> str:
    prefix = name.partition("/")[2]
    return f"{prefix}-{split}*.tar" if prefix else f"{split}*.tar"


def _index(shards: Sequence[Path]) -> tuple[list[tuple[int, str, int, int]], list[int], list[str]]:
    """The images of the shards as in `TarImages`, their labels, and the files that are left out, with reasons."""
    members, labels, left_out = [], [], []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, mode="r:") as tar:
                samples, unused = _group_members(tar)
                members += [(number, image.name, image.offset_data, image.size) for image, _ in samples]
                labels += [_label(tar, label) for _, label in samples]
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: not a readable shard: {one_line(error)}") from error
        left_out += [f"{shard}/{reason}" for reason in unused]
    return members, labels, left_out


def _group_members(tar: tarfile.TarFile) -> tuple[list[tuple[tarfile.TarInfo, tarfile.TarInfo]], list[str]]:
    """The image and the label file of each complete sample, and the other files of samples, with reasons.

    The files of a sample have the same path up to the last suffix.
    """
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    samples, left_out = [], []
    for member in tar:
        key, suffix = os.path.splitext(member.name)
        kind = "image" if is_image_name(member.name) else suffix.lower()
        hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
        if kind not in ("image", ".cls", ".json") or hidden or not member.isfile():
            continue
        if groups.setdefault(key, {}).setdefault(kind, member) is not member:
            left_out.append(f"{member.name} (a second one of sample {key})")
    for files in groups.values():
        label = files.get(".cls") or files.get(".json")
        if "image" in files and label is not None:
            samples.append((files["image"], label))
        else:
            left_out += [f"{member.name} (its image or label is missing)" for member in files.values()]
    return samples, left_out


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    """The class number in a .cls or .json file; raises ValueError."""
    try:
        content = json.loads(tar.extractfile(member).read())
        return class_number(content["label"] if member.name.lower().endswith(".json") else content)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{member.name}: no label: {one_line(error)}") from error
