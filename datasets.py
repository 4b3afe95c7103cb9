"""What feeds training and evaluation: which data, in which order, through which transforms.

Every random choice about a sample is keyed on (seed, epoch, sample, repeat), and every position in an epoch
is arithmetic. So the order of the samples and their augmentation are the same for any number of workers and
processes, and training goes on from the middle of an epoch without reading anything twice.

The parts are in the folder `inputs`. Hugging Face's package of the same name is reached by ``--data-set hfds/...``
(`inputs.hugging_face`), not by importing it here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from inputs.catalogue import build_dataset, dataset_spec
from inputs.image_sets import ImageDataset, PartOfEachClass
from inputs.label_map_trace import TokenLabelTransform
from inputs.label_maps import check_label_maps
from inputs.labelled_images import KeyedImages
from inputs.loader import EvalLoader, TrainLoader
from inputs.sampler import KeyedSampler
from inputs.settings import LoaderSettings
from inputs.transforms import build_transform, evaluation_crop, image_size
from runtime.processes import Distributed
from utils import UserError

REPEATS = 3  # repeated augmentation: times a sample follows itself


@dataclass
class Data:
    """The loaders of a run, and what a checkpoint has to know about its images."""

    train: TrainLoader | None
    val: EvalLoader
    class_names: tuple[str, ...]
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    num_classes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_classes = len(self.class_names)


def build_data(args: argparse.Namespace, dist: Distributed) -> Data:
    """The loaders for training and validation that the command line asks for.

    Raises:
        UserError: see `build_dataset`, `KeyedSampler` and `check_label_maps`.
    """
    if args.download and dist.is_main:
        for train in (True, False):
            _open(args, train, download=True)
    dist.barrier()
    train_set, data = _open(args, train=True), build_eval(args, dist)
    if train_set.class_names != data.class_names:
        difference = ", ".join(sorted(set(train_set.class_names) ^ set(data.class_names))[:10])
        raise UserError(f"--data-set {args.data_set}: classes of training or validation alone: {difference}")
    if args.train_part is not None:
        train_set = PartOfEachClass(train_set, *args.train_part)
    if args.token_label_data and dist.is_main:
        check_label_maps(train_set, args.token_label_data, data.num_classes)
    sampler = KeyedSampler(
        len(train_set),
        args.batch_size,
        args.seed,
        dist.rank,
        dist.world_size,
        args.accum_iter,
        REPEATS if args.repeated_aug else 1,
        args.resume,
    )
    samples = KeyedImages(train_set, _train_transform(args), args.seed, args.skip_bad_images, args.token_label_data)
    data.train = TrainLoader(samples, sampler, _loader_settings(args, dist, data.mean, data.std))
    return data


def build_eval(
    args: argparse.Namespace,
    dist: Distributed,
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bicubic",
) -> Data:
    """The validation loader alone. An unreadable image always stops it, by name."""
    dataset = _open(args, train=False)
    size = image_size(args.input_size)
    crop_pct = evaluation_crop(dataset_spec(args.data_set).glyphs, size, args.eval_crop_pct)
    transform = build_transform(False, size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)
    val = EvalLoader(KeyedImages(dataset, transform, seed=0), _loader_settings(args, dist, mean, std))
    return Data(None, val, dataset.class_names, size, tuple(mean), tuple(std), crop_pct, interpolation)


def _open(args: argparse.Namespace, train: bool, download: bool = False) -> ImageDataset:
    return build_dataset(
        args.data_set,
        args.data_path,
        train,
        download=download,
        inat_category=args.inat_category,
        classes=args.classes,
        val_split=args.val_split,
    )


def _train_transform(args: argparse.Namespace) -> Callable:
    # Without erasing, bytes are collated and normalised on the device.
    transform = build_transform(
        True,
        args.input_size,
        interpolation=args.train_interpolation,
        scale=args.scale,
        color_jitter=args.color_jitter,
        aa=args.aa,
        reprob=args.reprob,
        remode=args.remode,
        recount=args.recount,
        glyphs=dataset_spec(args.data_set).glyphs,
        normalize=args.reprob > 0,
    )
    return TokenLabelTransform(transform) if args.token_label_data else transform


def _loader_settings(
    args: argparse.Namespace, dist: Distributed, mean: Sequence[float], std: Sequence[float]
) -> LoaderSettings:
    return LoaderSettings(args.batch_size, args.num_workers, args.pin_mem, dist, mean, std)
