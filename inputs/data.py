"""The loaders for training and evaluation.

Every random choice about a sample is keyed on (seed, epoch, sample, repeat), and every position in an epoch
is computed. So the order and the augmentation of samples are the same for any number of workers and processes,
and training can resume from the middle of an epoch without reading any sample twice.
"""

import argparse
from collections.abc import Mapping
from typing import Any

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


def build_data(args: argparse.Namespace, dist: Distributed) -> tuple[TrainLoader, EvalLoader]:
    """Build the training and validation loaders from the command line.

    Raises:
        UserError: see `build_dataset`, `KeyedSampler` and `check_label_maps`.
    """
    if args.download and dist.is_main:
        for split in ("train", "val"):
            open_split(args, dist, split, download=True)
    dist.barrier()
    train_set, val_set = (open_split(args, dist, split) for split in ("train", "val"))
    if train_set.class_names != val_set.class_names:
        difference = ", ".join(sorted(set(train_set.class_names) ^ set(val_set.class_names))[:10])
        raise UserError(f"--data-set {args.data_set}: classes in only one of training and validation: {difference}")
    if args.train_part is not None:
        share, seed = args.train_part
        train_set, _ = divide_classes(train_set, share, seed, "train-part")
    if args.token_label_data and dist.is_main:
        check_label_maps(train_set, args.token_label_data)
    update = (args.batch_size, args.seed, dist.rank, dist.world_size, args.accum_iter)
    probabilities = balanced_probabilities(train_set) if args.balanced_sampling else None
    sampler = KeyedSampler(len(train_set), *update, REPEATS if args.repeated_aug else 1, probabilities)
    preprocessing = chosen_preprocessing(args)
    transform = train_transform(
        args.input_size,
        glyphs=dataset_spec(args.data_set).glyphs,
        mean=preprocessing["mean"],
        interpolation=args.train_interpolation,
        **{name: getattr(args, name) for name in AUGMENTATION},
    )
    samples = KeyedImages(
        train_set,
        TokenLabelTransform(transform) if args.token_label_data else transform,
        args.seed,
        args.skip_bad_images,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        pixel_range=args.pixel_range,
        label_maps=args.token_label_data,
        erasing=RandomErasing(args.reprob, args.remode, args.recount) if args.reprob > 0 else None,
    )
    train = TrainLoader(samples, sampler, dist, args.num_workers, args.pin_mem)
    return train, eval_loader(args, dist, val_set, preprocessing)


def eval_loader(
    args: argparse.Namespace, dist: Distributed, dataset: ImageDataset, preprocessing: Mapping[str, Any]
) -> EvalLoader:
    """Build a loader of all images without augmentation.

    Args:
        preprocessing: mean, std, crop_pct and interpolation.
    """
    crop_pct, interpolation = preprocessing["crop_pct"], preprocessing["interpolation"]
    samples = KeyedImages(
        dataset,
        eval_transform(args.input_size, crop_pct=crop_pct, interpolation=interpolation),
        skip_bad_images=args.skip_bad_images,
        replacements=0,
        mean=preprocessing["mean"],
        std=preprocessing["std"],
        pixel_range=args.pixel_range,
    )
    return EvalLoader(samples, args.batch_size, dist, args.num_workers, args.pin_mem)


def chosen_preprocessing(args: argparse.Namespace) -> dict[str, Any]:
    """The preprocessing of evaluation. Mean and std are by default ImageNet's (averaged if the images are not RGB)."""
    chosen = {"crop_pct": args.eval_crop_pct, "interpolation": "bicubic"}
    for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = getattr(args, name) or (default if args.in_chans == 3 else [round(sum(default) / 3, 4)])
        chosen[name] = tuple(values) * (args.in_chans // len(values))
    return chosen


def balanced_probabilities(dataset: ImageDataset) -> np.ndarray:
    """The probability of drawing each image, such that all classes are equally likely."""
    counts = np.bincount(dataset.labels)
    return 1 / (counts[dataset.labels] * np.count_nonzero(counts))


def open_split(args: argparse.Namespace, dist: Distributed, split: str, download: bool = False) -> ImageDataset:
    """Open the data set of the command line, and print how many files are left out, and the first of them."""
    options = {name: getattr(args, name) for name in DATASET_FLAGS}
    dataset = build_dataset(args.data_set, args.data_path, split, download=download, **options)
    if dataset.left_out and dist.is_main:
        count = len(dataset.left_out)
        tell(f"{count} file{'s' * (count > 1)} left out, the first {dataset.left_out[0]}")
    return dataset
