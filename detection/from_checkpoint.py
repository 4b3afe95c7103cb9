"""A detector from its checkpoint alone."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection.backbone import create_classifier
from detection.detectors import ARGUMENTS, POSITIVE, STRIDES, Detector
from detection.task import detector_over
from models.checkpoints import EMA_KEYS, check_model_kwargs, weights_of
from runtime.schema import Fields, Items, Number, Text
from training.model import load
from utils import UserError

DETECTOR = Fields(
    {
        "arch": Text(200),
        "detector": Text(among=tuple(STRIDES)),
        "heads": Text(among=("v2", "classic")),
        "detector_kwargs": ARGUMENTS,
        "num_classes": Number(1, 10_000, whole=True),
        "class_names": Items(Text(), most=10_000),
        "category_ids": Items(Number(whole=True), most=10_000),
        "input_size": Items(POSITIVE, 2, 2),
        "min_size": POSITIVE,
        "max_size": POSITIVE,
    },
    required={"arch", "detector", "heads", "class_names", "category_ids", "input_size", "min_size", "max_size"},
)


@dataclass(frozen=True)
class DetectorInfo:
    """What a checkpoint says about its detector. category_ids, class_names: by label, from label 1 on."""

    path: Path
    arch: str
    detector: str
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    ema: bool
    data_set: str | None  # of the run that trained it


def is_detector(state: dict[str, Any]) -> bool:
    return state.get("detector") is not None


def build_detector_from(path: Path, state: dict[str, Any], ema: bool | None) -> tuple[Detector, DetectorInfo]:
    """The detector that a checkpoint holds, in evaluation mode on the CPU, and what there is to know about it.

    Args:
        path: of the file, for messages.
        state: its content.
        ema: the averaged weights, the trained ones, or (None) the averaged ones if there are any.

    Raises:
        UserError: it describes no detector, or its weights are of another.
    """
    problem = DETECTOR.problem(state)
    if problem:
        raise UserError(f"{path}: it{problem}")
    names, ids = tuple(state["class_names"]), tuple(state["category_ids"])
    if len(names) != len(ids) or len(names) != state.get("num_classes"):
        raise UserError(f"{path}: it has {len(names)} class_names, {len(ids)} category_ids and another num_classes")
    kwargs = state.get("model_kwargs") or {}
    check_model_kwargs(kwargs, f"{path}: model_kwargs")
    weights = weights_of(state, ema, path)
    model = _build(state, kwargs, len(names))
    load(model, weights, str(path), new_head=False)
    averaged = ema is not False and any(state.get(key) for key in EMA_KEYS)
    data_set = (state.get("args") or {}).get("data_set")
    return model.eval(), DetectorInfo(path, state["arch"], state["detector"], names, ids, averaged, data_set)


def _build(state: dict[str, Any], model_kwargs: dict[str, Any], num_classes: int) -> Detector:
    settings = argparse.Namespace(
        arch=state["arch"],
        detector=state["detector"],
        heads=state["heads"],
        detector_kwargs=state.get("detector_kwargs") or {},
        min_size=(state["min_size"],),
        max_size=state["max_size"],
    )
    body = create_classifier(state["arch"], tuple(state["input_size"]), model_kwargs, drop_path=None)
    return detector_over(body, settings, num_classes)
