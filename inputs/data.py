"""The loaders for training and evaluation.

Every random choice about a sample is keyed on (seed, epoch, sample, repeat), and every position in an epoch
is computed. So the order and the augmentation of samples are the same for any number of workers and processes,
and training can resume from the middle of an epoch without reading any sample twice.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from inputs.catalogue import build_dataset, dataset_spec
from inputs.images import ImageDataset, divide_classes
from inputs.label_maps import check_label_maps
from inputs.loader import EvalLoader, KeyedImages, TrainLoader
from inputs.sampler import KeyedSampler
from inputs.token_labels import TokenLabelTransform
from inputs.transforms import RandomErasing, eval_transform, train_transform
from runtime.processes import Distributed
from utils import UserError, tell

AUGMENTATION = ("scale", "ratio", "hflip", "vflip", "no_aug", "color_jitter", "aa")  # arguments of `train_transform`
DATASET_FLAGS = ("classes", "inat_category", "val_split", "val_path", "csv_columns")
REPEATS = 3  # of each sample in repeated augmentation


@dataclass
class Data:
    """The loaders of a run, and the image settings that its checkpoints contain."""

    train: TrainLoader | None
    val: EvalLoader
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def build_data(args: argparse.Namespace, dist: Distributed) -> Data:
    """Build the loaders for training and validation from the command line.

    Raises:
        UserError: see `build_dataset`, `KeyedSampler` and `check_label_maps`.
    """
    if args.download and dist.is_main:
        for split in ("train", "val"):
            _open(args, split, download=True)
    dist.barrier()
    train_set, data = _open(args, "train"), build_eval(args, dist, **channel_statistics(args))
    if train_set.class_names != data.class_names:
        difference = ", ".join(sorted(set(train_set.class_names) ^ set(data.class_names))[:10])
        raise UserError(f"--data-set {args.data_set}: classes in only one of training and validation: {difference}")
    report_left_out(train_set, dist)
    if args.train_part is not None:
        share, seed = args.train_part
        train_set, _ = divide_classes(train_set, share, seed, "train-part")
    if args.token_label_data and dist.is_main:
        check_label_maps(train_set, args.token_label_data)
    update = (args.batch_size, args.seed, dist.rank, dist.world_size, args.accum_iter)
    probabilities = balanced_probabilities(train_set) if args.balanced_sampling else None
    sampler = KeyedSampler(len(train_set), *update, REPEATS if args.repeated_aug else 1, probabilities)
    transform = train_transform(
        args.input_size,
        glyphs=dataset_spec(args.data_set).glyphs,
        mean=data.mean,
        interpolation=args.train_interpolation,
        **{name: getattr(args, name) for name in AUGMENTATION},
    )
    samples = KeyedImages(
        train_set,
        TokenLabelTransform(transform) if args.token_label_data else transform,
        args.seed,
        args.skip_bad_images,
        mean=data.mean,
        std=data.std,
        pixel_range=args.pixel_range,
        label_maps=args.token_label_data,
        erasing=RandomErasing(args.reprob, args.remode, args.recount) if args.reprob > 0 else None,
    )
    data.train = TrainLoader(samples, sampler, dist, args.num_workers, args.pin_mem)
    return data


def build_eval(
    args: argparse.Namespace,
    dist: Distributed,
    *,
    split: str = "val",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bicubic",
) -> Data:
    """Build only the evaluation loader.

    Args:
        split: "val" (used for validation during training) or "test".
    """
    dataset = _open(args, split)
    report_left_out(dataset, dist)
    val = eval_loader(args, dist, dataset, mean, std, interpolation)
    return Data(None, val, dataset.class_names, tuple(mean), tuple(std), args.eval_crop_pct, interpolation)


def eval_loader(
    args: argparse.Namespace,
    dist: Distributed,
    dataset: ImageDataset,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
) -> EvalLoader:
    """Build a loader that reads every image of a data set once, without augmentation."""
    transform = eval_transform(args.input_size, crop_pct=args.eval_crop_pct, interpolation=interpolation)
    samples = KeyedImages(
        dataset, transform, 0, args.skip_bad_images, replacements=0, mean=mean, std=std, pixel_range=args.pixel_range
    )
    return EvalLoader(samples, args.batch_size, dist, args.num_workers, args.pin_mem)


def channel_statistics(args: argparse.Namespace) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of each channel: as given, else ImageNet's (averaged if not RGB)."""
    statistics = {}
    for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = getattr(args, name) or (default if args.in_chans == 3 else [round(sum(default) / 3, 4)])
        statistics[name] = tuple(values) * (args.in_chans // len(values))
    return statistics


def balanced_probabilities(dataset: ImageDataset) -> np.ndarray:
    """The probability of drawing each image, such that all classes are equally likely."""
    counts = np.bincount(dataset.labels)
    return 1 / (counts[dataset.labels] * np.count_nonzero(counts))


def report_left_out(dataset: ImageDataset, dist: Distributed) -> None:
    """Print how many files are left out, and the first of them."""
    if dataset.left_out and dist.is_main:
        count = len(dataset.left_out)
        tell(f"{count} file{'s' * (count > 1)} left out, the first {dataset.left_out[0]}")


def _open(args: argparse.Namespace, split: str, download: bool = False) -> ImageDataset:
    options = {name: getattr(args, name) for name in DATASET_FLAGS}
    return build_dataset(args.data_set, args.data_path, split, download=download, **options)
