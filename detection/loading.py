"""Load a detector from its checkpoint."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.backbone import create_classifier
from detection.detectors import Detector
from detection.task import detector_over
from models import CheckpointError, WeightMismatch, load_weights, weights_of
from models.checkpoints import EMA_KEYS, check_model_kwargs


@dataclass(frozen=True)
class LoadedDetector:
    """A detector in evaluation mode on the CPU, and the metadata of its checkpoint.

    ema: whether the weights are the averaged (EMA) ones. class_names, category_ids: in the order of the labels, from 1.
    """

    model: Detector
    path: Path
    arch: str
    detector: str
    ema: bool
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]


def load_detector(checkpoint: dict[str, Any], path: Path, ema: bool | None) -> LoadedDetector:
    """Build the detector of a checkpoint.

    Args:
        checkpoint: the result of `read_checkpoint`.
        path: the checkpoint file, for error messages.
        ema: True for the averaged (EMA) weights, False for the trained ones, None for the averaged ones if present.

    Raises:
        CheckpointError: if the file does not describe a detector, or its weights do not fit.
    """
    kwargs = checkpoint.get("model_kwargs") or {}
    check_model_kwargs(kwargs, f"{path}: model_kwargs")
    try:
        settings = argparse.Namespace(**checkpoint | {"min_size": (checkpoint["min_size"],)})
        body = create_classifier(settings.arch, tuple(settings.input_size), kwargs, drop_path=None)
        model = detector_over(body, settings, len(settings.class_names))
        load_weights(model, weights_of(checkpoint, ema, path))
        names, numbers = tuple(settings.class_names), tuple(settings.category_ids)
    except (AttributeError, KeyError, WeightMismatch) as error:  # the first two: a missing setting
        raise CheckpointError(f"{path}: not a detector of this project: {error}") from error
    averaged = ema is not False and any(checkpoint.get(key) for key in EMA_KEYS)
    return LoadedDetector(model.eval(), path, settings.arch, settings.detector, averaged, names, numbers)
