"""Label maps on disk: a teacher's prediction for each position in an image.

The labels of token labelling (Jiang et al. 2021, "All Tokens Matter"): a teacher's top-5 logits and their classes
on an 18×18 grid over the whole image. One file an image, ``<root>/<class folder>/<image stem>.pt``, a tensor (2, 5,
18, 18): logits, then class indices. The published maps are half floats, whose integers are exact to 2,048;
maps for more classes are the same tensor in float32. Both are read.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.checkpoints import check_archive
from utils import UserError, one_line

if TYPE_CHECKING:
    from inputs.images import ImageDataset

TOP_K = 5
MAP_SIZE = 18
MAP_SHAPE = (2, TOP_K, MAP_SIZE, MAP_SIZE)
HALF_EXACT = 2048  # classes whose indices half floats represent exactly
GENERATE = "python -m tools.generate_token_labels makes them"


def image_map_path(root: str | os.PathLike, image_path: str | os.PathLike) -> Path:
    """The label map of the image ``…/<class folder>/<stem>.<suffix>``."""
    image_path = Path(image_path)
    return Path(root) / image_path.parent.name / f"{image_path.stem}.pt"


def read_label_map(path: str | os.PathLike, num_classes: int | None = None) -> Tensor:
    """Read a label map.

    Args:
        num_classes: if given, larger or equal class indices are an error.

    Returns:
        (2, 5, 18, 18) in the file's dtype: logits, class indices.

    Raises:
        UserError: the file is missing, damaged, or not a label map; the message names it.
    """
    try:
        check_archive(path)
        label_map = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such label map ({GENERATE})") from error
    except Exception as error:  # a damaged file makes the unpickler fail in any way
        raise UserError(f"{path}: a damaged label map: {one_line(error)[:200]}") from error
    if not isinstance(label_map, Tensor) or label_map.shape != MAP_SHAPE or not label_map.isfinite().all():
        raise UserError(f"{path}: not a label map: expected finite numbers of shape {MAP_SHAPE}")
    index = label_map[1].double()
    if (index != index.floor()).any() or index.min() < 0:
        raise UserError(f"{path}: not a label map: its second half is not class indices")
    if num_classes is not None and index.max() >= num_classes:
        raise UserError(f"{path}: this label map names class {int(index.max())}, and there are {num_classes}")
    return label_map


def encode_label_map(logits: Tensor) -> Tensor:
    """The label map of a teacher's logits.

    Args:
        logits: (classes, 18, 18).

    Returns:
        (2, 5, 18, 18): half floats as published; float32, which represents larger indices exactly, beyond 2,048
        classes. With fewer than five classes the last one is repeated, which changes nothing in the dense
        map.
    """
    values, indices = logits.float().topk(min(TOP_K, len(logits)), dim=0)
    dtype = torch.float16 if len(logits) <= HALF_EXACT else torch.float32
    label_map = torch.stack([values, indices.float()]).to(dtype)
    repeated = label_map[:, -1:].expand(-1, TOP_K - label_map.shape[1], -1, -1)
    return torch.cat([label_map, repeated], dim=1)


def check_label_maps(dataset: ImageDataset, root: str | os.PathLike, num_classes: int, read: int = 100) -> None:
    """Check that every image has a label map, and that the first `read` maps are intact and fit the data.

    Damage in other maps is reported when they are used.

    Args:
        dataset: the images' files.
        num_classes: class indices must be below it.

    Raises:
        UserError: maps are missing (the message names the first and their number), or one does not fit.
    """
    if not os.path.isdir(root):
        raise UserError(f"--token-label-data {root}: no such folder")
    paths = [image_map_path(root, dataset.path(index)) for index in range(len(dataset))]
    with ThreadPoolExecutor(32) as pool:  # a million files, perhaps on a network disk
        missing = [path for path, found in zip(paths, pool.map(os.path.isfile, paths), strict=True) if not found]
        if missing:
            named = ", ".join(map(str, missing[:3])) + (", …" if len(missing) > 3 else "")
            raise UserError(
                f"--token-label-data {root}: {len(missing)} of {len(paths)} label maps are missing: {named}; {GENERATE}"
            )
        for _ in pool.map(lambda path: read_label_map(path, num_classes), paths[:read]):
            pass
