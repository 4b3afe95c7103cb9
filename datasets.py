"""What feeds training and evaluation: transforms, the order of the samples, loaders.

Every random choice about a sample is keyed on (seed, epoch, sample, repeat), and every position in an epoch
is arithmetic. So the order of the samples and their augmentation are the same for any number of workers and
processes, and training goes on from the middle of an epoch without reading anything twice.

The data sets themselves are in `sources`, whose names can be imported from here too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, auto_augment, create_transform
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms

from sources import (
    DATASETS,
    BadImage,
    ImageArrays,
    ImageDataset,
    ImageFiles,
    build_dataset,
    dataset_spec,
    read_image,
)
from token_labels import TokenLabelTransform, check_label_maps, image_map_path, read_label_map
from utils import Distributed, UserError, key_seed, seeded, tell

__all__ = [
    "DATASETS",
    "BadImage",
    "Batch",
    "Data",
    "EvalLoader",
    "ImageArrays",
    "ImageDataset",
    "ImageFiles",
    "KeyedDataset",
    "KeyedSampler",
    "LoaderSettings",
    "SampleKey",
    "TrainLoader",
    "build_data",
    "build_dataset",
    "build_eval",
    "build_transform",
    "evaluation_batches",
    "evaluation_crop",
    "image_size",
    "read_image",
]

SMALL_INPUT = 32  # up to this size DeiT crops with padding instead of rescaling
REPEATS = 3  # repeated augmentation: times a sample follows itself
REPEAT_ROUND = 256  # an epoch of repeated augmentation has a multiple of this many samples
REPLACEMENT_TRIES = 100


# ------------------------------------------------------------------------------------------------- transforms


def image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) from --input-size, given as one number or two; raises UserError otherwise."""
    pair = (size,) if isinstance(size, int) else tuple(size)
    if len(pair) not in (1, 2) or min(pair) < 1:
        raise UserError(f"--input-size {' '.join(map(str, pair))}: one positive number, or height and width")
    return (pair[0], pair[-1])


def _posterize(image: Image.Image, bits: int, **fill: Any) -> Image.Image:
    """RandAugment's strongest posterize keeps no bits: a black image. Pillow 13 refuses to make it."""
    return Image.new(image.mode, image.size) if bits == 0 else auto_augment.posterize(image, bits, **fill)


auto_augment.NAME_TO_OP |= dict.fromkeys([name for name in auto_augment.NAME_TO_OP if "Posterize" in name], _posterize)


def build_transform(
    train: bool,
    input_size: int | Sequence[int],
    *,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    color_jitter: float | None = 0.4,
    aa: str | None = None,
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
    glyphs: bool = False,
    normalize: bool = True,
) -> transforms.Compose:
    """Timm's transform from an RGB image to a tensor (3, H, W), as DeiT sets it up.

    Training: RandomResizedCrop, flip, RandAugment or colour jitter, erasing; up to 32 pixels, and for glyphs,
    a crop with padding in the place of the first. Evaluation: resize the shorter side to size / crop_pct,
    then crop the centre.

    Args:
        input_size: one side, or height and width.
        crop_pct: evaluation only; see `evaluation_crop`.
        color_jitter: its strength; RandAugment takes its place.
        aa: an augmentation policy of timm's; None or "" for none.
        glyphs: images whose class changes when they are mirrored: no flip, and a gentle crop.
        normalize: give float, normalised with mean and std; else uint8. Erasing fills with noise in
            normalised units and needs the former.
    """
    size = image_size(input_size)
    if not train:
        return create_transform(
            size, interpolation=interpolation, mean=mean, std=std, crop_pct=crop_pct, normalize=normalize
        )
    transform = create_transform(
        size,
        is_training=True,
        color_jitter=color_jitter,
        auto_augment=aa or None,
        interpolation=interpolation,
        mean=mean,
        std=std,
        hflip=0.0 if glyphs else 0.5,
        re_prob=reprob,
        re_mode=remode,
        re_count=recount,
        normalize=normalize,
    )
    if glyphs or max(size) <= SMALL_INPUT:
        resample = "bicubic" if interpolation == "random" else interpolation
        transform.transforms[0] = transforms.Compose(
            [
                transforms.Resize(max(size), transforms.InterpolationMode(resample)),
                transforms.RandomCrop(size, padding=max(1, min(size) // 8)),
            ]
        )
    return transform


def evaluation_crop(data_set: str, input_size: int | Sequence[int], crop_pct: float) -> float:
    """What evaluation crops: small inputs and glyphs are seen whole, the rest as --eval-crop-pct says."""
    whole = dataset_spec(data_set).glyphs or max(image_size(input_size)) <= SMALL_INPUT
    return 1.0 if whole else crop_pct


# ------------------------------------------------------------------------------------------------------ order


class SampleKey(NamedTuple):
    """Names a sample of an epoch; together with the seed, the key of all its randomness."""

    epoch: int
    index: int
    repeat: int


@dataclass(frozen=True)
class KeyedSampler:
    """The order of training samples, by arithmetic alone.

    The order of an epoch is a permutation keyed on (seed, epoch). Micro-step s takes the s-th piece of
    G = batch_size · world_size samples; a rank takes every world_size-th of the piece. What is left
    over at the end, less than accum_iter · G samples, is not used in that epoch.

    With repeats > 1 it is DeiT's RASampler (Hoffer et al. 2020, "Augment your batch"; Berman et al. 2019):
    each sample comes `repeats` times in a row, hence on different ranks and under different keys, and the
    epoch ends after as many samples as the data set has, rounded down to a multiple of 256 if it has so many.

    Args:
        size: samples in the data set.
        batch_size: samples a rank and micro-step.
        accum_iter: micro-steps an optimiser step; an epoch holds whole optimiser steps.

    Raises:
        UserError: the data set is smaller than one optimiser step.
    """

    size: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accum_iter: int = 1
    repeats: int = 1

    def __post_init__(self) -> None:
        if len(self) == 0:
            step = self.batch_size * self.world_size * self.accum_iter
            raise UserError(
                f"an update takes {step} images (--batch-size {self.batch_size} x "
                f"{self.world_size} processes x --accum-iter {self.accum_iter}) and the training "
                f"set has {self.size}: lower --batch-size"
            )

    def __len__(self) -> int:
        """Micro-steps an epoch."""
        rounded = self.repeats > 1 and self.size >= REPEAT_ROUND
        samples = self.size // REPEAT_ROUND * REPEAT_ROUND if rounded else self.size
        return samples // (self.batch_size * self.world_size * self.accum_iter) * self.accum_iter

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation of all samples."""
        key = key_seed(self.seed, "order", epoch)
        # RandomState's streams are frozen for good, those of numpy's and torch's generators may change.
        return np.random.RandomState([key & 0xFFFFFFFF, key >> 32]).permutation(self.size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[list[SampleKey]]:
        """This rank's batches of an epoch, from micro-step `start_step` on."""
        order = self.order(epoch)
        piece = self.batch_size * self.world_size
        for step in range(start_step, len(self)):
            positions = range(step * piece + self.rank, (step + 1) * piece, self.world_size)
            yield [SampleKey(epoch, int(order[p // self.repeats]), p % self.repeats) for p in positions]


def evaluation_batches(size: int, batch_size: int, rank: int, world_size: int) -> list[list[SampleKey]]:
    """A rank's batches for evaluation: every world_size-th image, none twice and none added."""
    keys = [SampleKey(0, index, 0) for index in range(rank, size, world_size)]
    return [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]


# ---------------------------------------------------------------------------------------------------- loaders


class Batch(NamedTuple):
    """A batch on the device.

    images: (B, 3, H, W) float32, normalised. targets: int64 (B,), or the collated records of token labels.
    indices: int64 (B,) on the CPU, for ``dataset.path``.
    """

    images: torch.Tensor
    targets: torch.Tensor | dict[str, torch.Tensor]
    indices: torch.Tensor


class Sample(NamedTuple):
    image: torch.Tensor
    target: int | dict[str, torch.Tensor]
    index: int
    skipped: tuple[tuple[str, str], ...]  # path and reason of the unreadable images that it stands in for


class KeyedDataset(torch.utils.data.Dataset):
    """Decoded and transformed samples by key. It has no random state: a key always gives the same tensor."""

    def __init__(
        self,
        dataset: ImageDataset,
        transform: Callable,
        seed: int,
        skip_bad_images: bool = False,
        label_maps: str | None = None,
    ):
        """label_maps: the folder of token-label maps; `transform` is then a `TokenLabelTransform`."""
        self.dataset = dataset
        self._transform = transform
        self._seed = seed
        self._skip_bad_images = skip_bad_images
        self._label_maps = label_maps

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> Sample | UserError:
        """The sample, or the error met: one raised in a worker would reach the user as a traceback."""
        skipped = []
        for index in self._candidates(key):
            try:
                with seeded(self._seed, key.epoch, index, key.repeat):
                    return Sample(*self._read(index), index, tuple(skipped))
            except BadImage as error:
                if not self._skip_bad_images:
                    return error
                skipped.append((self.dataset.path(index), str(error)))
            except UserError as error:
                return error
        return UserError(f"{skipped[0][1]}; nor can any of {REPLACEMENT_TRIES} others tried in its place")

    def _candidates(self, key: SampleKey) -> Iterator[int]:
        """The sample itself, then those that may stand in for it, each with its own label."""
        yield key.index
        for attempt in range(REPLACEMENT_TRIES):
            yield key_seed(self._seed, "replacement", *key, attempt) % len(self.dataset)

    def _read(self, index: int) -> tuple[torch.Tensor, int | dict[str, torch.Tensor]]:
        image, label = self.dataset.load(index)
        if self._label_maps is None:
            return self._transform(image), label
        label_map = read_label_map(
            image_map_path(self._label_maps, self.dataset.path(index)), len(self.dataset.class_names)
        )
        return self._transform(image, label_map, label)


def collate(samples: Sequence[Sample | UserError]) -> tuple | UserError:
    """(images, targets, indices, skipped) of a batch, or the first error in it."""
    failed = next((sample for sample in samples if isinstance(sample, UserError)), None)
    if failed is not None:
        return failed
    images, targets, indices, skipped = zip(*samples, strict=True)
    return default_collate(images), default_collate(targets), torch.tensor(indices), sum(skipped, ())


def _start_worker(_worker: int) -> None:
    """Leave signals to the main process: a whole job may get them at once, and it has to save first."""
    for ignored in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with_parent(parent: multiprocessing.process.BaseProcess) -> None:
    """End this process when the main one says so by SIGTERM, or is gone; SIGTERM from others is ignored."""
    while parent.is_alive():
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent.pid:
            break
    os._exit(0)


@dataclass
class LoaderSettings:
    """What the loaders of a run share."""

    batch_size: int
    num_workers: int
    pin_memory: bool
    dist: Distributed
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD


class _Batches:
    """The batches that the next pass over a torch loader reads; set before each pass."""

    def __init__(self) -> None:
        self.keys: Iterator[list[SampleKey]] | list[list[SampleKey]] = []

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.keys)


class _DeviceLoader:
    """Reads batches in worker processes and puts them on the device, one ahead of the step on CUDA."""

    def __init__(self, samples: KeyedDataset, settings: LoaderSettings):
        self.dataset = samples.dataset
        self.skipped: dict[str, str] = {}  # the unreadable images met so far, path to reason
        self._device = settings.dist.device
        # On the scale of uint8, so that the division by 255 is not needed.
        self._mean, self._std = (
            torch.tensor(values, device=self._device).mul_(255).view(1, -1, 1, 1)
            for values in (settings.mean, settings.std)
        )
        self._batches = _Batches()
        self._loader = DataLoader(
            samples,
            batch_sampler=self._batches,
            num_workers=settings.num_workers,
            collate_fn=collate,
            pin_memory=settings.pin_memory and self._device.type == "cuda",
            persistent_workers=settings.num_workers > 0,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # of its own: the loader draws a number that nothing here uses
        )
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None

    def _read(self, batches: Iterator[list[SampleKey]] | list[list[SampleKey]]) -> Iterator[Batch]:
        self._batches.keys = batches
        # Threads that a library starts in a worker as it is forked inherit this: see `_start_worker`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            loaded_batches = iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if self._stream is None:
            yield from map(self._place, loaded_batches)
            return
        ahead = None
        for loaded in loaded_batches:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                batch = self._place(loaded)
            if ahead is not None:
                yield ahead
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            ahead = batch
        if ahead is not None:
            yield ahead

    def _place(self, loaded: tuple | UserError) -> Batch:
        if isinstance(loaded, UserError):
            raise loaded
        images, targets, indices, skipped = loaded
        for path, reason in skipped:
            if path not in self.skipped:
                self.skipped[path] = reason
                tell(f"skipped: {reason}")
        images = self._move(images)
        if images.dtype == torch.uint8:
            images = images.float().sub_(self._mean).div_(self._std)
        if isinstance(targets, dict):
            return Batch(images, {name: self._move(value) for name, value in targets.items()}, indices)
        return Batch(images, self._move(targets), indices)

    def _move(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self._device, non_blocking=True)


class TrainLoader(_DeviceLoader):
    """Training batches of this rank. Its length is the number of micro-steps an epoch."""

    def __init__(self, samples: KeyedDataset, sampler: KeyedSampler, settings: LoaderSettings):
        super().__init__(samples, settings)
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from micro-step `start_step` on; raises UserError at an unreadable file."""
        return self._read(self.sampler.epoch(epoch, start_step))


class EvalLoader(_DeviceLoader):
    """This rank's share of the images to evaluate, each of them on exactly one rank.

    `rounds` is the largest number of batches that a rank has; ranks may differ by one, or have none.
    """

    def __init__(self, samples: KeyedDataset, settings: LoaderSettings):
        super().__init__(samples, settings)
        dist = settings.dist
        self._keys = evaluation_batches(len(samples), settings.batch_size, dist.rank, dist.world_size)
        self.rounds = len(evaluation_batches(len(samples), settings.batch_size, 0, dist.world_size))

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Batch]:
        return self._read(self._keys)


# --------------------------------------------------------------------------------------------- from the flags


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

    def skipped(self, dist: Distributed) -> str | None:
        """What --skip-bad-images left out on all ranks, in one line; every rank has to call it."""
        files = {path for found in dist.gather_objects(sorted(self.train.skipped)) for path in found}
        if not files:
            return None
        named = ", ".join(sorted(files)[:10]) + (", ..." if len(files) > 10 else "")
        return f"{len(files)} unreadable images were skipped, others took their places: {named}"


def build_data(args: argparse.Namespace, dist: Distributed) -> Data:
    """The loaders for training and validation that the command line asks for.

    Raises:
        UserError: see `build_dataset`, `KeyedSampler` and `token_labels.check_label_maps`.
    """
    if args.download and dist.is_main:
        for train in (True, False):
            _open(args, train, download=True)
    dist.barrier()
    train_set, data = _open(args, train=True), build_eval(args, dist)
    if train_set.class_names != data.class_names:
        difference = ", ".join(sorted(set(train_set.class_names) ^ set(data.class_names))[:10])
        raise UserError(f"--data-set {args.data_set}: classes of training or validation alone: {difference}")
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
    )
    samples = KeyedDataset(train_set, _train_transform(args), args.seed, args.skip_bad_images, args.token_label_data)
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
    crop_pct = evaluation_crop(args.data_set, size, args.eval_crop_pct)
    transform = build_transform(False, size, crop_pct=crop_pct, interpolation=interpolation, normalize=False)
    val = EvalLoader(KeyedDataset(dataset, transform, seed=0), _loader_settings(args, dist, mean, std))
    return Data(None, val, dataset.class_names, size, tuple(mean), tuple(std), crop_pct, interpolation)


def _open(args: argparse.Namespace, train: bool, download: bool = False) -> ImageDataset:
    return build_dataset(
        args.data_set, args.data_path, train, download=download, inat_category=args.inat_category, classes=args.classes
    )


def _train_transform(args: argparse.Namespace) -> Callable:
    # Without erasing, bytes are collated and normalised on the device.
    transform = build_transform(
        True,
        args.input_size,
        interpolation=args.train_interpolation,
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
