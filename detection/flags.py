"""The flags of detection: the detector, its data, augmentation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from detection.detectors import ARGUMENTS
from training.arguments import COUNT, FRACTION, POSITIVE, KeyValues, Parser, integers
from training.options import TaskFlags, refuse


def add_flags(parser: Parser) -> None:
    """All of them."""
    add = parser.add_argument_group("detector").add_argument
    add(
        "--detector",
        default="mask_rcnn",
        choices=["mask_rcnn", "faster_rcnn", "retinanet"],
        help="torchvision's, over --arch's features",
    )
    add("--heads", default="v2", choices=["v2", "classic"], help="as in torchvision's newer builders, or the first")
    add(
        "--detector-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="fpn_channels=256 anchor_sizes=(32,64,128,256,512) detections=100, and numbers that torchvision's "
        "constructor takes",
    )
    add("--backbone-weights", metavar="PATH", help="a classifier's, for the backbone")
    add = parser.add_argument_group("data").add_argument
    add("--data-set", choices=["COCO", "NUCLEI"], help="(default: COCO with --data-path, else NUCLEI, embedded)")
    add("--data-path", metavar="DIR", help="annotations/instances_train*.json, train*/, and the same for val")
    add(
        "--min-size",
        type=integers,
        default=(800,),
        metavar="PIXELS,...",
        help="short side; one of these in training, the last in evaluation (default: 800)",
    )
    add("--max-size", type=POSITIVE, default=1333, metavar="PIXELS", help="at most for the long side")
    add("--hflip", type=FRACTION, default=0.5, metavar="P", help="left for right")
    add("--vflip", type=FRACTION, default=0.0, metavar="P", help="top for bottom")
    add(
        "--large-scale-jitter",
        type=COUNT,
        default=0,
        metavar="PIXELS",
        help="instead of --min-size: scale by 0.1 to 2, crop or pad to a square of this side; 0: off",
    )


def implied(_given: Mapping[str, Any]) -> dict[str, Any]:
    """No flag implies another."""
    return {}


def derived(args: Mapping[str, Any]) -> dict[str, Any]:
    """The data set that a path or its absence suggests."""
    return {"data_set": "COCO" if args["data_path"] else "NUCLEI"}


def check(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself, and arguments of the detector that are of another kind."""
    refuse(
        (problem := ARGUMENTS.problem(args.detector_kwargs), f"--detector-kwargs{problem}"),
        (None in args.detector_kwargs.values(), "--detector-kwargs: None is not a number"),
        (args.backbone_weights and args.finetune, "--finetune has the backbone's weights too: no --backbone-weights"),
        (args.max_size < args.min_size[-1], f"--max-size {args.max_size} is below --min-size {args.min_size[-1]}"),
        (args.compile, "--compile: detectors take images of many sizes, for each of which they would be compiled"),
        (args.drop, "--drop is of a classifier, which a detector has not"),
    )


FLAGS = TaskFlags(add_flags, implied, derived, check)
