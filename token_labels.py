"""Token labelling (Jiang et al. 2021, "All Tokens Matter"): label maps, augmentation, dense targets.

A label map holds what a teacher sees in an image, place by place: its top-5 logits and their classes on an
18×18 grid over the whole image. One file an image, ``<root>/<class folder>/<image stem>.pt``, a tensor (2, 5,
18, 18): logits, then class indices. The published maps are half floats, whose integers are exact to 2,048;
maps for more classes are the same tensor in float32. Both are read.

The augmentation of an image is recorded as a crop box and an affine map (`TokenLabelTransform`), and a whole
batch of maps is turned into targets on the device (`dense_targets`).
"""

from __future__ import annotations

import copy
import io
import math
import os
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import AugmentOp, AugMixAugment, AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as vision

from utils import UserError, one_line

TOP_K = 5
MAP_SIZE = 18
MAP_SHAPE = (2, TOP_K, MAP_SIZE, MAP_SIZE)
HALF_EXACT = 2048  # classes whose indices half floats hold exactly
MAX_FILE_BYTES = 2**20  # a map has 6.5 or 13 KB; anything this large is something else
MIN_FILE_BYTES = 2 * TOP_K * MAP_SIZE**2 * 2
Record = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------ files


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
        content = Path(path).read_bytes() if os.path.getsize(path) <= MAX_FILE_BYTES else None
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such label map (tools/generate_token_labels.py makes them)") from error
    except OSError as error:
        raise UserError(f"{path}: this label map cannot be read: {error.strerror}") from error
    if content is None:
        raise UserError(f"{path}: too large for a label map of shape {MAP_SHAPE}")
    try:
        _check_archive(content)
        label_map = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes make it stumble over
        raise UserError(f"{path}: a damaged label map: {one_line(error)[:200]}") from error
    problem = _problem(label_map, num_classes)
    if problem is not None:
        raise UserError(f"{path}: not a label map for this data: {problem}")
    return label_map


def _check_archive(content: bytes) -> None:
    """Raise ValueError where the file's own checksums do not fit; `torch.load` does not look at them."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return  # torch's format before 1.6 has no checksums
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > MAX_FILE_BYTES:
            raise ValueError("it unpacks to far more than a label map")
        broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} does not fit")


def _problem(label_map: Any, num_classes: int | None) -> str | None:
    """What keeps `label_map` from being one, in words."""
    if not isinstance(label_map, Tensor):
        return f"it holds a {type(label_map).__name__}, not a tensor"
    if tuple(label_map.shape) != MAP_SHAPE or label_map.is_complex() or label_map.layout != torch.strided:
        return f"its shape is {tuple(label_map.shape)}, not {MAP_SHAPE}"
    numbers = label_map.numpy() if label_map.dtype != torch.bfloat16 else label_map.float().numpy()
    if not np.isfinite(numbers).all():
        return "it holds values that are not finite"
    index = numbers[1].astype(np.float32)
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


class NamedImages(Protocol):
    """What `check_label_maps` needs of a data set."""

    def __len__(self) -> int: ...

    def path(self, index: int) -> str: ...


def check_label_maps(
    dataset: NamedImages, root: str | os.PathLike, num_classes: int, read: int = 10_000, threads: int = 32
) -> None:
    """Verify, before training, that every image has its label map.

    Of every map the existence and the size are looked at; `read` of them, evenly spread (all of a smaller
    data set), are read whole. Damage in the others is found when they are used, and named then.

    Args:
        dataset: anything with a length and ``path(index)``, the image's file.
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
                f"cut short: {named}; tools/generate_token_labels.py makes them"
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


# ----------------------------------------------------------------------------------------------- augmentation


class Trace:
    """Where the pixels of an augmented image come from, in fractions of width and height.

    crop: (y, x, height, width) of the crop in the source image.
    frames: 3×3 each, take (x, y, 1) in the image as it is now to (x, y, 1) in an earlier one: the crop as it
        was cut out, then every image that a geometric operation was applied to. What lies outside any of
        them was filled in.
    """

    def __init__(self) -> None:
        self.crop = (0.0, 0.0, 1.0, 1.0)
        self.frames = [np.eye(3)]

    def move(self, matrix: Sequence[Sequence[float]], size: tuple[int, int], fills: bool = True) -> None:
        """Add an operation that takes pixel p from matrix·p in an image of size (width, height).

        fills: whether parts of that image may fall out of sight, and others be filled in.
        """
        scale = np.diag([*size, 1.0])
        step = np.linalg.inv(scale) @ np.array(matrix, dtype=np.float64) @ scale
        self.frames = [frame @ step for frame in self.frames] + ([step] if fills else [])

    def affines(self, count: int) -> Tensor:
        """The frames, and the identity in the place of those that were not needed, (count, 2, 3)."""
        padded = self.frames + [np.eye(3)] * (count - len(self.frames))
        return torch.from_numpy(np.stack(padded)[:, :2]).float()


# What the geometric operations of timm.data.auto_augment fill place (x, y, 1) from, given their level and the
# image's width and height. The origin is the corner of the first pixel, not its centre.


def _shear_x(level: float, width: int, height: int) -> list[list[float]]:
    return [[1, level, 0], [0, 1, 0], [0, 0, 1]]


def _shear_y(level: float, width: int, height: int) -> list[list[float]]:
    return [[1, 0, 0], [level, 1, 0], [0, 0, 1]]


def _translate(x: float, y: float) -> list[list[float]]:
    return [[1, 0, x], [0, 1, y], [0, 0, 1]]


def _rotate(degrees: float, width: int, height: int) -> list[list[float]]:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    return [[cos, -sin, x - cos * x + sin * y], [sin, cos, y - sin * x - cos * y], [0, 0, 1]]


GEOMETRIC_OPS: dict[str, Callable[[float, int, int], list[list[float]]]] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": lambda level, width, height: _translate(level, 0),
    "TranslateY": lambda level, width, height: _translate(0, level),
    "TranslateXRel": lambda level, width, height: _translate(level * width, 0),
    "TranslateYRel": lambda level, width, height: _translate(0, level * height),
    "Rotate": _rotate,
}
# These leave every place of the image where it is, in fractions of width and height.
STATIONARY = (
    transforms.ColorJitter,
    transforms.RandomGrayscale,
    transforms.GaussianBlur,
    transforms.Resize,
    transforms.Normalize,
    transforms.ToTensor,
    transforms.PILToTensor,
    MaybePILToTensor,
    RandomErasing,
)
Step = Callable[[Any, Trace], Any]


class TokenLabelTransform:
    """A training transform that also says what to do with the label map.

    The image is what `transform` gives, by the same draws from the global random generators.

    Args:
        transform: timm's training transform (`timm.data.create_transform`) for RGB images: a crop first
            (RandomResizedCrop, or RandomCrop with padding), then flips, RandAugment or AutoAugment, and
            changes of colour; with pixels or normalised floats as output.

    Raises:
        UserError: AugMix, which shows several warped copies of the image at once.
        ValueError: a step of which it is not known what it moves.
    """

    def __init__(self, transform: transforms.Compose):
        steps = _flat(transform)
        self._steps = [_traced_step(step) for step in steps]
        self._frames = 1 + sum(_operations(step) for step in steps)

    def __call__(self, image: Image.Image, label_map: Tensor, label: int) -> tuple[Tensor, Record]:
        """Transform one sample.

        Args:
            label_map: (2, 5, 18, 18), see `read_label_map`.
            label: the image's class.

        Returns:
            The image, and a record for `dense_targets`, whose tensors collate: values (5, 18, 18) float32,
            indices (5, 18, 18) int32, crop (4,) (y, x, height, width) as fractions of the image, affines
            (n, 2, 3), from the final image to the crop and to the images in between, label () int64.
        """
        trace = Trace()
        for step in self._steps:
            image = step(image, trace)
        return image, {
            "values": label_map[0].float(),
            "indices": label_map[1].int(),
            "crop": torch.tensor(trace.crop),
            "affines": trace.affines(self._frames),
            "label": torch.tensor(label),
        }


def _flat(transform: transforms.Compose) -> list[Callable]:
    """The steps of nested compositions in order."""
    return [
        part
        for step in transform.transforms
        for part in (_flat(step) if isinstance(step, transforms.Compose) else [step])
    ]


def _operations(step: Callable) -> int:
    """How many operations a step applies at most."""
    if isinstance(step, RandAugment):
        return step.num_layers
    return max(map(len, step.policy)) if isinstance(step, AutoAugment) else 0


def _traced_step(step: Callable) -> Step:
    for kind, traced in TRACED_STEPS:
        if isinstance(step, kind):
            return partial(traced, step)
    if isinstance(step, AugMixAugment):
        raise UserError("--aa augmix shows several warped copies of an image at once: not with token labels")
    raise ValueError(f"token labels: not known where {type(step).__name__} moves pixels")


def _stationary(step: Callable, image: Any, trace: Trace) -> Any:
    return step(image)


def _resized_crop(step: RandomResizedCropAndInterpolation, image: Image.Image, trace: Trace) -> Image.Image:
    recorded = copy.copy(step)
    recorded.get_params = partial(_recorded_crop, step.get_params, trace)
    return recorded(image)


def _recorded_crop(get_params: Callable, trace: Trace, image: Image.Image, *ranges: Sequence[float]) -> tuple:
    top, left, height, width = get_params(image, *ranges)
    trace.crop = (top / image.height, left / image.width, height / image.height, width / image.width)
    return top, left, height, width


def _padded_crop(step: transforms.RandomCrop, image: Image.Image, trace: Trace) -> Image.Image:
    margin = step.padding or 0
    if not isinstance(margin, int) or step.pad_if_needed:
        raise ValueError("token labels: RandomCrop pads by one number or not at all")
    padded = vision.pad(image, margin, step.fill, step.padding_mode)
    top, left, height, width = step.get_params(padded, step.size)
    trace.crop = (
        (top - margin) / image.height,
        (left - margin) / image.width,
        height / image.height,
        width / image.width,
    )
    return vision.crop(padded, top, left, height, width)


def _horizontal_flip(step: transforms.RandomHorizontalFlip, image: Image.Image, trace: Trace) -> Image.Image:
    if torch.rand(1) >= step.p:
        return image
    trace.move([[-1, 0, image.width], [0, 1, 0], [0, 0, 1]], image.size, fills=False)
    return vision.hflip(image)


def _vertical_flip(step: transforms.RandomVerticalFlip, image: Image.Image, trace: Trace) -> Image.Image:
    if torch.rand(1) >= step.p:
        return image
    trace.move([[1, 0, 0], [0, -1, image.height], [0, 0, 1]], image.size, fills=False)
    return vision.vflip(image)


def _rand_augment(step: RandAugment, image: Image.Image, trace: Trace) -> Image.Image:
    traced = copy.copy(step)
    traced.ops = [_traced_op(op, trace) for op in step.ops]
    return traced(image)


def _auto_augment(step: AutoAugment, image: Image.Image, trace: Trace) -> Image.Image:
    traced = copy.copy(step)
    traced.policy = [[_traced_op(op, trace) for op in sub_policy] for sub_policy in step.policy]
    return traced(image)


def _traced_op(op: AugmentOp, trace: Trace) -> AugmentOp:
    """`op`, which draws its level itself, reporting what it does with it."""
    if op.name not in GEOMETRIC_OPS:
        return op
    traced = copy.copy(op)
    traced.aug_fn = partial(_recorded_op, op, trace)
    return traced


def _recorded_op(
    op: AugmentOp, trace: Trace, image: Image.Image, level: float, *, fillcolor: Any, resample: Any
) -> Image.Image:
    trace.move(GEOMETRIC_OPS[op.name](level, *image.size), image.size)
    return op.aug_fn(image, level, fillcolor=fillcolor, resample=resample)


TRACED_STEPS: tuple[tuple[type | tuple[type, ...], Callable], ...] = (
    (RandomResizedCropAndInterpolation, _resized_crop),
    (transforms.RandomCrop, _padded_crop),
    (transforms.RandomHorizontalFlip, _horizontal_flip),
    (transforms.RandomVerticalFlip, _vertical_flip),
    (RandAugment, _rand_augment),
    (AutoAugment, _auto_augment),
    (STATIONARY, _stationary),
)


# ---------------------------------------------------------------------------------------------- dense targets


@torch.no_grad()
def dense_targets(
    record: Record, num_classes: int, size: int | tuple[int, int], smoothing: float = 0.1, swapped: bool = False
) -> Tensor:
    """The training targets of a batch, on the device of the record.

    The logits are scattered over zeros, averaged over the region that each token sees by RoIAlign, and put
    through a softmax over the classes. What the augmentation filled from outside the image counts as zero
    logits, like a class that the teacher did not name: a token without any image gets the uniform
    distribution.

    Smoothing s with C classes makes p of a softmax's p the target p·(1 − s + s/C) + s/C, as the reference
    does; a smoothed token target therefore sums to 1 + s/C. The ground truth's sums to 1.

    Args:
        record: collated records of `TokenLabelTransform`.
        size: tokens of the last stage, one side or (height, width).
        swapped: hand RoIAlign its box with x and y exchanged, as the reference does (another region's labels
            for every crop off the diagonal); for exact reproduction only.

    Returns:
        (B, classes, 1 + 1 + h·w): ground truth, class token, tokens row by row. With size 1, whose one token
        is the class token's region, (B, classes, 2).

    Raises:
        UserError: the maps name a class that the data does not have (on a CPU; CUDA stops with an assertion).
    """
    height, width = (size, size) if isinstance(size, int) else size
    with torch.autocast(record["values"].device.type, enabled=False):
        grids = [(1, 1)] if (height, width) == (1, 1) else [(1, 1), (height, width)]
        logits = region_logits(record, num_classes, grids, swapped)
        off = smoothing / num_classes
        on = 1 - smoothing + off
        labels = torch.nn.functional.one_hot(record["label"], num_classes)
        ground_truth = torch.where(labels.bool(), on, off).unsqueeze(2)
        return torch.cat([ground_truth, logits.softmax(1) * on + off], dim=2)


def region_logits(record: Record, num_classes: int, grids: Sequence[tuple[int, int]], swapped: bool = False) -> Tensor:
    """The mean logits of the regions of one or several (h, w) grids over each augmented image.

    Returns:
        (B, classes, sum of the grids' h·w).
    """
    values, indices = record["values"].flatten(2), record["indices"].long().flatten(2)
    if indices.device.type == "cpu" and int(indices.max()) >= num_classes:
        raise UserError(
            f"--token-label-data: a label map names class {int(indices.max())}, and there are "
            f"{num_classes}; tools/generate_token_labels.py --check finds it"
        )
    dense = values.new_zeros(len(values), num_classes, MAP_SIZE**2).scatter_(1, indices, values)
    weights = [_region_weights(record["crop"], record["affines"], grid, swapped) for grid in grids]
    return dense @ torch.cat(weights, dim=1).mT


def _region_weights(crop: Tensor, affines: Tensor, grid: tuple[int, int], swapped: bool) -> Tensor:
    """What each place of a map counts for in each region, (B, h·w, 18·18).

    RoIAlign (He et al. 2017; ``aligned=False``, adaptive number of samples) averages bilinear samples on a
    regular grid. torchvision's takes upright boxes only; here the same samples go through the affine map
    first. For upright boxes inside the image the two agree.

    Args:
        crop: (B, 4) y, x, height, width as fractions. affines: (B, n, 2, 3).
    """
    top_left = crop[:, :2] if swapped else crop[:, [1, 0]]
    extent = crop[:, 2:] if swapped else crop[:, [3, 2]]
    start = top_left * MAP_SIZE - 0.5  # (B, 2): along x, along y
    extent = ((top_left + extent) * MAP_SIZE - 0.5 - start).clamp(min=1)
    x, weight_x = _sample_places(extent[:, 0], grid[1])
    y, weight_y = _sample_places(extent[:, 1], grid[0])

    # Places in the final image, (B, h, w, samples along y, samples along x), in the crop and in the map.
    x, y = torch.broadcast_tensors(x[:, None, :, None, :], y[:, :, None, :, None])
    weight = weight_x[:, None, :, None, :] * weight_y[:, :, None, :, None]
    places = torch.stack([x, y, torch.ones_like(x)], dim=-1)
    in_frames = torch.einsum("bnij,bhwklj->nbhwkli", affines, places)
    shape = (-1, 1, 1, 1, 1, 2)
    in_map = in_frames[0] * extent.view(shape) + start.view(shape)
    margin = 1e-4  # of a map cell; rounding must not put a sample outside
    inside = ((in_frames >= -margin) & (in_frames <= 1 + margin)).all(dim=0)
    inside = (inside & (in_map >= -0.5 - margin) & (in_map <= MAP_SIZE - 0.5 + margin)).all(dim=-1)

    # Bilinear weights of the 18 columns and the 18 rows; in the outermost half cell the value stays constant.
    cells = torch.arange(MAP_SIZE, device=crop.device)
    hats = (1 - (in_map.clamp(0, MAP_SIZE - 1).unsqueeze(-1) - cells).abs()).clamp(min=0)
    weights = torch.einsum("bhwkl,bhwklr,bhwklc->bhwrc", weight * inside, hats[..., 1, :], hats[..., 0, :])
    return weights.flatten(3).flatten(1, 2)


def _sample_places(extent: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """RoIAlign's samples along one axis: as many a bin as it has map cells, rounded up.

    Args:
        extent: (B,) of the crop, in map cells.

    Returns:
        Places in [0, 1] and their weights, both (B, bins, samples); spare samples weigh 0.
    """
    count = torch.ceil(extent / bins)[:, None, None]
    sample = torch.arange(math.ceil(MAP_SIZE / bins), device=extent.device)
    bin_number = torch.arange(bins, device=extent.device)[:, None]
    places = (bin_number + (sample + 0.5) / count) / bins
    return places, ((sample < count) / count).expand_as(places)


# -------------------------------------------------------------------------------------------------- the model


def token_label_size(model: torch.nn.Module, requested: int | None = None) -> tuple[int, int]:
    """The (height, width) of a model's token labels: the grid of its last stage.

    Args:
        requested: --token-label-size, if given.

    Raises:
        UserError: the model has no token-labelling head, or a grid of another size.
    """
    if not getattr(model, "token_label", False):
        raise UserError("--token-label: this model labels no tokens; spectformer_h_* and svt_h_* can")
    height, width = model.token_label_size
    if requested is not None and (requested, requested) != (height, width):
        right = f"it is {height}" if height == width else f"leave it out, the grid is {height}x{width}"
        raise UserError(f"--token-label-size {requested}: does not fit this model and input size; {right}")
    return height, width
