"""What feeds a detector: images of any sizes with their objects, in loaders for training and evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from detection.coco import NUCLEI, CocoImages, open_split
from detection.sampler import GroupedSampler
from detection.transforms import TrainTransform
from inputs.loader import EvalLoader, TrainLoader
from inputs.samples import KeyedSamples
from inputs.settings import LoaderSettings
from runtime.processes import Distributed
from utils import UserError


class Batch(NamedTuple):
    """A batch on the device.

    images: uint8 (3, H, W) each; targets: as `TrainTransform` gives them, empty in evaluation; indices: int64 (B,) on
    the CPU.
    """

    images: list[Tensor]
    targets: list[dict[str, Any]]
    indices: Tensor


class DetectionSamples(KeyedSamples):
    """Images with their objects to train on, or alone where there is no transform."""

    def __init__(
        self,
        dataset: CocoImages,
        seed: int = 0,
        transform: TrainTransform | None = None,
        skip_bad_images: bool = False,
    ):
        super().__init__(dataset, seed, skip_bad_images)
        self._transform = transform

    def read(self, index: int) -> tuple[Tensor, dict[str, Any]]:
        if self._transform is None:
            return v2.functional.pil_to_tensor(self.dataset.image(index)), {}
        return self._transform(*self.dataset.load(index))

    def collate(self, contents: list[tuple[Tensor, dict[str, Any]]]) -> list[list]:
        return [list(part) for part in zip(*contents, strict=True)]

    def placement(self, settings: LoaderSettings) -> Callable[[list[list], Tensor], Batch]:
        return partial(_place, settings.dist.device)


def _place(device: torch.device, content: list[list], indices: Tensor) -> Batch:
    def move(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    images, targets = content
    return Batch(
        [move(image) for image in images],
        [{name: move(value) for name, value in target.items()} for target in targets],
        indices,
    )


@dataclass
class DetectionData:
    """The data sets and loaders of a run."""

    train_set: CocoImages
    val_set: CocoImages
    train: TrainLoader
    val: EvalLoader


def data_path(args: argparse.Namespace) -> str:
    """The folder in COCO's layout that --data-set and --data-path name."""
    if args.data_set == "NUCLEI":
        if args.data_path is not None:
            raise UserError("--data-set NUCLEI is embedded; --data-path is for --data-set COCO")
        return str(NUCLEI)
    if args.data_path is None:
        raise UserError("--data-set COCO: --data-path has to say where its folders annotations/, train*/, val*/ are")
    return args.data_path


def build_data(args: argparse.Namespace, dist: Distributed, masks: bool) -> DetectionData:
    """The loaders that the command line asks for.

    Raises:
        UserError: see `open_split`; the splits differ in their categories; there is nothing to train on; or an update
            takes more images than there are.
    """
    path = data_path(args)
    train_set, val_set = (open_split(path, split, masks) for split in ("train", "val"))
    categories = [dict(zip(split.category_ids, split.class_names, strict=True)) for split in (train_set, val_set)]
    if categories[0] != categories[1]:
        number, name = sorted(categories[0].items() ^ categories[1].items())[0]
        raise UserError(f"--data-path {path}: training and validation differ in category {number}, {name!r}")
    if train_set.objects == 0:
        raise UserError(
            f"{train_set.file}: it has no object to train on: crowds (iscrowd: 1) and boxes without area do not count"
        )
    sampler = GroupedSampler(
        len(train_set),
        args.batch_size,
        args.seed,
        dist.rank,
        dist.world_size,
        args.accum_iter,
        resumed=args.resume,
        groups=train_set.groups,
    )
    samples = DetectionSamples(train_set, args.seed, TrainTransform(args), args.skip_bad_images)
    train = TrainLoader(samples, sampler, LoaderSettings(args.batch_size, args.num_workers, args.pin_mem, dist))
    return DetectionData(train_set, val_set, train, build_eval_loader(val_set, args, dist))


def build_eval_loader(dataset: CocoImages, args: argparse.Namespace, dist: Distributed) -> EvalLoader:
    """Images one by one: together with others an image is padded, and its predictions are others."""
    return EvalLoader(DetectionSamples(dataset), LoaderSettings(1, args.num_workers, args.pin_mem, dist))
