"""Tar shards in webdataset's layout, on a local disk, read by position.

timm's reader streams them, in an order that depends on the number of workers and cannot be resumed. Read by
position, they are shuffled by key like any other data set.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.images import IMAGE_SUFFIXES, BadImage, ImageDataset, class_number, count_classes
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
    members, labels = _index(own)
    other = _shards(options, SPLIT_NAMES["val" if options.train else "train"])
    all_labels = np.array(labels + (_index(other)[1] if other else []))
    return TarImages(own, members, labels, [str(i) for i in range(count_classes(all_labels))])


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


def _index(shards: Sequence[Path]) -> tuple[list[tuple[int, str, int, int]], list[int]]:
    members, labels = [], []
    for number, shard in enumerate(shards):
        try:
            with tarfile.open(shard, mode="r:") as tar:
                for image, label in _samples(tar):
                    members.append((number, image.name, image.offset_data, image.size))
                    labels.append(label)
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: not a readable shard: {one_line(error)}") from error
    return members, labels


def _samples(tar: tarfile.TarFile) -> list[tuple[tarfile.TarInfo, int]]:
    """The images of a shard with their labels."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isfile():
            folder, _, file = member.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[f".{suffix.lower()}"] = member
    found = []
    for key, files in samples.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image is not None:
            try:
                found.append((image, _label(tar, files)))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{key}: no label: {one_line(error)}") from error
    return found


def _label(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> int:
    """The label beside an image; raises ValueError, KeyError or TypeError where there is none."""
    if ".cls" in files:
        text = tar.extractfile(files[".cls"]).read().strip().decode("ascii")
        return class_number(int(text) if text.isdigit() else text)
    if ".json" not in files:
        raise ValueError("there is no .cls or .json")
    return class_number(json.loads(tar.extractfile(files[".json"]).read())["label"])
