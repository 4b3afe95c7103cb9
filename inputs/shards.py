"""Tar shards in webdataset's layout, on a local disk, read by position.

timm's reader streams them, in an order that depends on the number of workers and cannot be resumed. Read by
position, their order is keyed as that of any other data set.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from inputs.image_sets import ImageDataset, class_number, count_classes
from inputs.images import BadImage, read_image
from inputs.request import Request
from runtime.files import open_file
from utils import UserError, one_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MAX_LABEL_BYTES = 2**20  # of a .cls or a .json


class TarImages:
    """Images in uncompressed tar files."""

    def __init__(
        self,
        shards: Sequence[Path],
        members: Sequence[tuple[int, str, int, int]],
        labels: Sequence[int],
        class_names: Sequence[str],
    ):
        """members: (shard number, name, offset in bytes, size in bytes) of each image."""
        self._shards = [str(shard) for shard in shards]
        self._names = np.array([os.fsencode(name) for _, name, _, _ in members])
        self._extents = np.array([(shard, offset, size) for shard, _, offset, size in members], dtype=np.int64)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.class_names = tuple(class_names)

    def __len__(self) -> int:
        return len(self._names)

    def load(self, index: int) -> tuple[Image.Image, int]:
        shard, offset, size = self._extents[index]
        try:
            with open_file(self._shards[shard]) as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as error:
            raise BadImage(f"{self.path(index)}: {error.strerror}") from error
        return read_image(io.BytesIO(content), self.path(index)), int(self.labels[index])

    def path(self, index: int) -> str:
        return f"{self._shards[self._extents[index, 0]]}/{os.fsdecode(self._names[index])}"


def web_shards(request: Request) -> ImageDataset:
    """wds/NAME: KEY.jpg beside KEY.cls, or KEY.json with "label".

    The shards are those that _info.json names for the split, or NAME-train*.tar and NAME-val*.tar (without
    NAME: train*.tar and val*.tar).
    """
    own = _shards(request, request.train)
    if not own:
        raise request.missing(
            f"shards {_pattern(request.name, request.split)}, or _info.json naming "
            "them, on a disk (a remote stream cannot be read by position)"
        )
    members, labels = _index(own)
    other = _shards(request, not request.train)
    all_labels = np.array(labels + (_index(other)[1] if other else []))
    return TarImages(own, members, labels, [str(i) for i in range(count_classes(all_labels))])


def _shards(request: Request, train: bool) -> list[Path]:
    splits = ("train",) if train else ("validation", "val", "test")
    for info in (request.root / "_info.json", request.root / "info.json"):
        if info.is_file():
            try:
                named = request.read_json(info.name)["splits"]
                split = next((split for split in splits if split in named), None)
                return [request.root / file for file in named[split]["filenames"]] if split else []
            except (KeyError, TypeError) as error:
                raise UserError(f"{info}: no splits with filenames in it") from error
    try:
        found = (sorted(request.root.glob(_pattern(request.name, split))) for split in splits)
        return next(filter(None, found), [])
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"--data-set {request.name}: {one_line(error)}") from error


def _pattern(name: str, split: str) -> str:
    prefix = name.partition("/")[2]
    return f"{prefix}-{split}*.tar" if prefix else f"{split}*.tar"


def _index(shards: Sequence[Path]) -> tuple[list[tuple[int, str, int, int]], list[int]]:
    members, labels = [], []
    for number, shard in enumerate(shards):
        try:
            with open_file(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
                found = list(_samples(tar))
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: not a readable shard: {one_line(error)}") from error
        members += [(number, image.name, image.offset_data, image.size) for image, _ in found]
        labels += [label for _, label in found]
    return members, labels


def _samples(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, int]]:
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in tar:
        if member.isfile():
            folder, _, file = member.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            samples.setdefault(f"{folder}/{stem}", {})[f".{suffix.lower()}"] = member
    for key, files in samples.items():
        image = next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None)
        if image is None:
            continue
        try:
            yield image, class_number(_label(tar, files))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{key}: no label: {one_line(error)}") from error


def _label(tar: tarfile.TarFile, files: dict[str, tarfile.TarInfo]) -> Any:
    """What stands as the label beside an image."""
    member = files.get(".cls") or files.get(".json")
    if member is None or member.size > MAX_LABEL_BYTES:
        raise ValueError("there is no .cls or .json" if member is None else f"{member.name} is too large")
    content = tar.extractfile(member).read()
    if ".cls" not in files:
        return json.loads(content)["label"]
    text = content.strip().decode("ascii")
    return int(text) if text.isdigit() and len(text) < 10 else text
