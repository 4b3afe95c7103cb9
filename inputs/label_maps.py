"""Label maps on disk: what a teacher sees in an image, place by place.

The labels of token labelling (Jiang et al. 2021, "All Tokens Matter"): a teacher's top-5 logits and their classes
on an 18×18 grid over the whole image. One file an image, ``<root>/<class folder>/<image stem>.pt``, a tensor (2, 5,
18, 18): logits, then class indices. The published maps are half floats, whose integers are exact to 2,048;
maps for more classes are the same tensor in float32. Both are read.
"""

from __future__ import annotations

import io
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inputs.image_sets import NamedImages
from models.checkpoints import check_archive
from runtime.files import open_file
from utils import UserError, one_line

TOP_K = 5
MAP_SIZE = 18
MAP_SHAPE = (2, TOP_K, MAP_SIZE, MAP_SIZE)
DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
}
HALF_EXACT = 2048  # classes whose indices half floats hold exactly
MAX_FILE_BYTES = 2**20  # a map has 6.5 or 13 KB; anything this large is something else
MIN_FILE_BYTES = 2 * TOP_K * MAP_SIZE**2 * 2


def image_map_path(root: str | os.PathLike, image_path: str | os.PathLike) -> Path:
    """Where the label map of the image ``…/<class folder>/<stem>.<extension>`` lies."""
    image_path = Path(image_path)
    return Path(root) / image_path.parent.name / f"{image_path.stem}.pt"


def read_label_map(path: str | os.PathLike, num_classes: int | None = None) -> Tensor:
    """Read a label map.

    Args:
        num_classes: if given, class indices from there on are refused.

    Returns:
        (2, 5, 18, 18) in the file's dtype: logits, class indices.

    Raises:
        UserError: the file is missing, damaged, or not a label map; the message names it.
    """
    try:
        with open_file(path) as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such label map (python -m tools.generate_token_labels makes them)") from error
    except OSError as error:
        raise UserError(f"{path}: this label map cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise UserError(f"{path}: too large for a label map of shape {MAP_SHAPE}")
    try:
        check_archive(io.BytesIO(content))
        label_map = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to
        raise UserError(f"{path}: a damaged label map: {one_line(error)[:200]}") from error
    problem = _problem(label_map, num_classes)
    if problem is not None:
        raise UserError(f"{path}: not a label map for this data: {problem}")
    return label_map


def _problem(label_map: Any, num_classes: int | None) -> str | None:
    """What keeps `label_map` from being one, in words."""
    if type(label_map) is not Tensor:
        return f"it holds a {type(label_map).__name__}, not a tensor"
    plain = label_map.layout == torch.strided and label_map.device.type == "cpu" and label_map.dtype in DTYPES
    if not plain or label_map.is_nested or label_map.requires_grad:
        kind = "nested" if label_map.is_nested else "with gradients" if label_map.requires_grad else label_map.layout
        return f"it holds a tensor of {label_map.dtype} ({kind}, {label_map.device}), not of plain numbers"
    if label_map.shape != MAP_SHAPE:
        return f"its shape is {tuple(label_map.shape)}, not {MAP_SHAPE}"
    numbers = label_map.double().numpy()
    if not np.isfinite(numbers).all():
        return "it holds values that are not finite"
    index = numbers[1]
    if (index != np.floor(index)).any() or index.min() < 0:
        return "its second half does not hold class indices"
    if num_classes is not None and index.max() >= num_classes:
        return f"it names class {int(index.max())}, and there are {num_classes}"
    return None


def encode_label_map(logits: Tensor) -> Tensor:
    """The label map of a teacher's logits.

    Args:
        logits: (classes, 18, 18).

    Returns:
        (2, 5, 18, 18): half floats as published; float32, which holds larger indices exactly, beyond 2,048
        classes. With fewer than five classes the last one is repeated, which changes nothing in the dense
        map.
    """
    values, indices = logits.float().topk(min(TOP_K, len(logits)), dim=0)
    dtype = torch.float16 if len(logits) <= HALF_EXACT else torch.float32
    label_map = torch.stack([values, indices.float()]).to(dtype)
    repeated = label_map[:, -1:].expand(-1, TOP_K - label_map.shape[1], -1, -1)
    return torch.cat([label_map, repeated], dim=1)


def check_label_maps(
    dataset: NamedImages, root: str | os.PathLike, num_classes: int, read: int = 10_000, threads: int = 32
) -> None:
    """Verify, before training, that every image has its label map.

    Of every map the existence and the size are looked at; `read` of them, evenly spread (all of a smaller
    data set), are read whole. Damage in the others is found when they are used, and named then.

    Args:
        dataset: its images' files.
        num_classes: class indices have to be below it.

    Raises:
        UserError: names the first files that are missing or damaged, and how many there are.
    """
    if not os.path.isdir(root):
        raise UserError(f"--token-label-data {root}: no such folder")
    size = len(dataset)
    with ThreadPoolExecutor(threads) as pool:
        shares = [range(start, min(start + 1000, size)) for start in range(0, size, 1000)]
        missing = [path for found in pool.map(partial(_missing, dataset, root), shares) for path in found]
        if missing:
            named = ", ".join(str(path) for path in missing[:3]) + (", …" if len(missing) > 3 else "")
            raise UserError(
                f"--token-label-data {root}: {len(missing)} of {size} label maps are missing or "
                f"cut short: {named}; python -m tools.generate_token_labels makes them"
            )
        spread = range(0, size, math.ceil(size / read) or 1)
        sample = [image_map_path(root, dataset.path(index)) for index in spread]
        for _ in pool.map(partial(read_label_map, num_classes=num_classes), sample):
            pass


def _missing(dataset: NamedImages, root: str | os.PathLike, indices: range) -> list[Path]:
    """The maps of these images that are not there, or too small to be whole."""
    paths = [image_map_path(root, dataset.path(index)) for index in indices]
    return [path for path in paths if _file_size(path) < MIN_FILE_BYTES]


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
