"""Tar shards in webdataset's layout on a local disk.

timm streams shards, so its order depends on the number of workers and training cannot resume in the middle of an epoch.
Here, images are read at their positions in the files, and are shuffled like those of other data sets.
"""

import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from inputs.dataset_options import SPLIT_NAMES, DatasetOptions
from inputs.images import BadImage, ImageDataset, file_dataset, is_image_name
from utils import UserError, one_line


def web_shards(options: DatasetOptions) -> ImageDataset:
    """Open wds/NAME: the shards NAME-train*.tar and NAME-val*.tar, or train*.tar and val*.tar for wds/.

    A sample consists of an image, KEY.jpg or another format, and its class number in KEY.cls.
    """
    name = options.name.removeprefix("wds/")
    prefix = f"{name}-" if name else ""

    def shards_of(splits: Sequence[str]) -> list[Path]:
        found = (sorted(options.root.glob(f"{prefix}{split}*.tar")) for split in splits)
        return next(filter(None, found), [])

    shards = shards_of(options.split_names)
    if not shards:
        raise options.missing(f"shards {prefix}{options.split}*.tar on a local disk")
    found, left_out = _index(shards)
    others, _ = _index(shards_of(SPLIT_NAMES["val" if options.train else "train"]))
    class_count = max((label for _, label, *_ in found + others), default=-1) + 1
    positions = np.array([position for _, _, *position in found], dtype=np.int64)

    def source(index: int) -> BinaryIO:
        shard, offset, size = positions[index]
        try:
            with open(shards[shard], "rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))
        except OSError as error:
            raise BadImage(f"{dataset.path(index)}: {error.strerror}") from error

    paths, labels = [path for path, *_ in found], [label for _, label, *_ in found]
    dataset = file_dataset(paths, labels, [str(i) for i in range(class_count)], left_out=left_out)
    return replace(dataset, source=source)


def _index(shards: Sequence[Path]) -> tuple[list[tuple[str, int, int, int, int]], list[str]]:
    """(path, label, shard number, offset, size in bytes) of each image, and the files that are left out."""
    found, left_out = [], []
    for number, shard in enumerate(shards):
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}  # the image and the .cls file by their common name
        try:
            with tarfile.open(shard, mode="r:") as tar:
                for member in tar:
                    key, suffix = os.path.splitext(member.name)
                    kind = "image" if is_image_name(member.name) else suffix.lower()
                    hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
                    if hidden or not member.isfile() or kind not in ("image", ".cls"):
                        continue
                    if samples.setdefault(key, {}).setdefault(kind, member) is not member:
                        left_out.append(f"{shard}/{member.name} (a second file of its sample)")
                for sample in samples.values():
                    if len(sample) == 2:
                        image, label = sample["image"], _class_number(tar, sample[".cls"])
                        found.append((f"{shard}/{image.name}", label, number, image.offset_data, image.size))
                    else:
                        (alone,) = sample.values()
                        left_out.append(f"{shard}/{alone.name} (no image or no .cls file of its sample)")
        except (OSError, tarfile.TarError, ValueError) as error:
            raise UserError(f"{shard}: not a readable shard: {one_line(error)}") from error
    return found, left_out


def _class_number(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = tar.extractfile(member).read()
    if not text.strip().isdigit():
        raise ValueError(f"{member.name}: {text[:40]!r} is not a class number")
    return int(text)
