"""The input pipeline against timm's."""

import statistics
from dataclasses import asdict
from itertools import cycle

import torch
from timm.data import create_dataset, create_loader

from inputs.catalogue import build_dataset
from inputs.loader import KeyedImages, TrainLoader
from inputs.sampler import KeyedSampler
from inputs.transforms import RandomErasing, train_transform
from runtime.processes import Distributed
from utils import UserError

from .settings import Settings
from .stopwatch import speed_ratio, take_turns

RECIPE = {"color_jitter": 0.4, "interpolation": "bicubic"}  # of both loaders, with the following
AUGMENT, ERASE = "rand-m9-mstd0.5-inc1", 0.25


def compare_loaders(folder: str, settings: Settings, workers: int, rounds: int) -> dict:
    """Training batches of `folder`/val by the published recipe, ours and timm's, an epoch a round."""
    ours, library = _own_loader(folder, settings, workers), _timm_loader(folder, settings, workers)
    epochs = cycle(range(1000))
    runs = {
        "ours": lambda: [batch.images.sum() for batch in ours.epoch(next(epochs))],
        "timm": lambda: [images.sum() for images, _ in library],
    }
    images = len(ours) * settings.batch_size
    if len(library) != len(ours):
        raise UserError(f"{folder}: timm finds other images there than we do")
    seconds = take_turns(runs, rounds, settings.device)
    figures = {who: images / statistics.median(times) for who, times in seconds.items()}
    ratio = speed_ratio(seconds, "ours", "timm")
    return {
        "settings": asdict(settings),
        "rounds": rounds,
        "loader": {"workers": workers, "images": images, "images_per_s": figures, "ratio": ratio},
    }


def _own_loader(folder: str, settings: Settings, workers: int) -> TrainLoader:
    dataset = build_dataset("FOLDER", folder, "val")
    transform = train_transform(settings.img_size, aa=AUGMENT, **RECIPE)
    pin = settings.device == "cuda"
    dist = Distributed(device=torch.device(settings.device))
    sampler = KeyedSampler(len(dataset), settings.batch_size, seed=0)
    return TrainLoader(KeyedImages(dataset, transform, erasing=RandomErasing(ERASE)), sampler, dist, workers, pin)


def _timm_loader(folder: str, settings: Settings, workers: int):
    return create_loader(
        create_dataset("", folder, split="val"),
        (3, settings.img_size, settings.img_size),
        settings.batch_size,
        is_training=True,
        auto_augment=AUGMENT,
        re_prob=ERASE,
        re_mode="pixel",
        num_workers=workers,
        pin_memory=settings.device == "cuda",
        device=torch.device(settings.device),
        persistent_workers=workers > 0,
        **RECIPE,
    )
