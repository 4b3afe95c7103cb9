"""A detector from its checkpoint."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.backbone import create_classifier
from detection.detectors import Detector, kinds_of
from detection.task import detector_over
from models import CheckpointError, load_weights, weights_of
from models.checkpoints import EMA_KEYS, check_model_kwargs


@dataclass(frozen=True)
class LoadedDetector:
    """A detector with its weights, and what its checkpoint says about it.

    model: in evaluation mode, on the CPU; path: the file; kinds: what it finds, "box" and perhaps "mask"; class_names,
    category_ids: by label, from label 1 on; ema: whether the weights are averaged ones; data_set: that it was trained
    on.
    """

    model: Detector
    path: Path
    arch: str
    detector: str
    kinds: tuple[str, ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    ema: bool
    data_set: str | None


def is_detector(checkpoint: dict[str, Any]) -> bool:
    return checkpoint.get("detector") is not None


def load_detector(checkpoint: dict[str, Any], path: Path, ema: bool | None) -> LoadedDetector:
    """The detector of a checkpoint that has been read.

    Args:
        path: of the file.
        ema: the averaged weights, the trained ones, or (None) the averaged ones if there are any.

    Raises:
        CheckpointError: its weights do not fit the detector that it describes.
    """
    kwargs = checkpoint.get("model_kwargs") or {}
    check_model_kwargs(kwargs, f"{path}: model_kwargs")
    try:
        settings = argparse.Namespace(
            arch=checkpoint["arch"],
            detector=checkpoint["detector"],
            heads=checkpoint["heads"],
            detector_kwargs=checkpoint.get("detector_kwargs") or {},
            min_size=(checkpoint["min_size"],),
            max_size=checkpoint["max_size"],
        )
        names, ids = tuple(checkpoint["class_names"]), tuple(checkpoint["category_ids"])
        body = create_classifier(settings.arch, tuple(checkpoint["input_size"]), kwargs, drop_path=None)
    except KeyError as error:
        raise CheckpointError(
            f"{path}: it says nothing about its {error}, so it is no detector of this project"
        ) from None
    model = detector_over(body, settings, len(names))
    try:
        load_weights(model, weights_of(checkpoint, ema, path))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    averaged = ema is not False and any(checkpoint.get(key) for key in EMA_KEYS)
    data_set = (checkpoint.get("args") or {}).get("data_set")
    return LoadedDetector(
        model.eval(),
        path,
        settings.arch,
        settings.detector,
        kinds_of(settings.detector),
        names,
        ids,
        averaged,
        data_set,
    )
