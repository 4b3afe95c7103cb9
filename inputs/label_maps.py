"""Label maps on disk: a teacher's predictions at the positions of an image.

In token labelling (Jiang et al. 2021, "All Tokens Matter"), a label map contains a teacher's top-5 logits and their
classes on an 18×18 grid over the whole image. The map of an image is ``<root>/<class folder>/<image stem>.pt``, a
tensor (2, 5, 18, 18) of logits and class indices. The published maps are float16, which represents integers exactly up
to 2,048; maps of more classes are float32.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from inputs.images import ImageDataset
from models.checkpoints import check_archive
from utils import UserError, one_line

TOP_K = 5
MAP_SIZE = 18
MAP_SHAPE = (2, TOP_K, MAP_SIZE, MAP_SIZE)
HALF_EXACT = 2048  # float16 represents the indices of this many classes exactly


def image_map_path(root: str | os.PathLike, image_path: str | os.PathLike) -> Path:
    """The label map of the image ``…/<class folder>/<stem>.<suffix>``."""
    image_path = Path(image_path)
    return Path(root) / image_path.parent.name / f"{image_path.stem}.pt"


def read_label_map(path: str | os.PathLike, num_classes: int) -> Tensor:
    """Read a label map: (2, 5, 18, 18) in the file's dtype, logits and class indices below `num_classes`.

    Raises:
        UserError: the file is missing, damaged, not a label map, or for more classes; the message names it.
    """
    try:
        check_archive(path)
        label_map = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many types of errors for a damaged file
        raise UserError(f"{path}: a missing or damaged label map: {one_line(error)[:200]}") from error
    if not isinstance(label_map, Tensor) or label_map.shape != MAP_SHAPE or not label_map.isfinite().all():
        raise UserError(f"{path}: not a label map: expected finite numbers of shape {MAP_SHAPE}")
    index = label_map[1].double()
    if (index != index.floor()).any() or index.min() < 0 or index.max() >= num_classes:
        raise UserError(f"{path}: not a label map of {num_classes} classes: its indices are not all below that")
    return label_map


def encode_label_map(logits: Tensor) -> Tensor:
    """The label map (2, 5, 18, 18) of a teacher's logits (classes, 18, 18).

    It is float16, or float32 for more than 2,048 classes. If there are fewer than five classes, the last one is
    repeated, which does not change the training targets.
    """
    values, indices = logits.float().topk(min(TOP_K, len(logits)), dim=0)
    dtype = torch.float16 if len(logits) <= HALF_EXACT else torch.float32
    label_map = torch.stack([values, indices.float()]).to(dtype)
    repeated = label_map[:, -1:].expand(-1, TOP_K - label_map.shape[1], -1, -1)
    return torch.cat([label_map, repeated], dim=1)


def check_label_maps(dataset: ImageDataset, root: str | os.PathLike, read: int = 100) -> None:
    """Check that every image of a data set has a label map, and read the first `read` maps.

    Raises:
        UserError: maps are missing (the message names the first and their number), or one of them is not valid.
    """
    paths = [image_map_path(root, dataset.path(index)) for index in range(len(dataset))]
    with ThreadPoolExecutor(32) as pool:  # a million files, perhaps on a network disk
        missing = [path for path, found in zip(paths, pool.map(os.path.isfile, paths), strict=True) if not found]
        if missing:
            raise UserError(
                f"--token-label-data {root}: {len(missing)} of {len(paths)} label maps are missing, the first is "
                f"{missing[0]}; python -m tools.generate_token_labels makes them"
            )
        for _ in pool.map(lambda path: read_label_map(path, len(dataset.class_names)), paths[:read]):
            pass
