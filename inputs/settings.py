"""What the loaders of a run share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from runtime.processes import Distributed


@dataclass(frozen=True)
class LoaderSettings:
    """batch_size: of evaluation (a sampler knows its own); mean, std: of the channels, for images of 0 to 1."""

    batch_size: int
    num_workers: int
    pin_memory: bool
    dist: Distributed
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN
    std: Sequence[float] = IMAGENET_DEFAULT_STD
