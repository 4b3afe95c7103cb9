"""The command-line flags for detection: detector, data and augmentation."""

from collections.abc import Mapping
from typing import Any

from training.arguments import COUNT, FRACTION, POSITIVE, FlagTable, KeyValues, integers, text
from training.options import Checks, TaskFlags

TABLE: FlagTable = {
    "detector": [
        ("--detector", ["mask_rcnn", "faster_rcnn", "retinanet"], "mask_rcnn", None, "torchvision detector"),
        ("--heads", ["v2", "classic"], "v2", None, "heads of torchvision's v2 builders, or the classic ones"),
        ("--detector-kwargs", KeyValues, {}, "KEY=VALUE", "fpn_channels, anchor_sizes, detections or torchvision's"),
        ("--backbone-weights", text, None, "PATH", "checkpoint of a classifier to initialize the backbone"),
    ],
    "data": [
        ("--data-set", ["COCO", "NUCLEI"], None, None, "default: COCO with --data-path, else the embedded NUCLEI"),
        ("--data-path", text, None, "DIR", "folder with annotations/instances_train*.json and train*/, same for val"),
        ("--min-size", integers, (800,), "PIXELS,...", "short sides; evaluation uses the last one (default: 800)"),
        ("--max-size", POSITIVE, 1333, "PIXELS", "upper limit of the long side"),
        ("--hflip", FRACTION, 0.5, "P", "probability of a horizontal flip"),
        ("--vflip", FRACTION, 0.0, "P", "probability of a vertical flip"),
        ("--large-scale-jitter", COUNT, 0, "PIXELS", "scale by 0.1 to 2, then crop or pad to this size; 0: off"),
    ],
}
CHECKS: Checks = [
    (lambda a: (a.data_set == "COCO") != bool(a.data_path), "--data-set: COCO needs --data-path, NUCLEI excludes it"),
    (lambda a: a.backbone_weights and a.finetune, "--finetune includes the backbone: leave out --backbone-weights"),
    (lambda a: a.max_size < a.min_size[-1], "--max-size {max_size} is below --min-size {min_size}"),
    (lambda a: a.compile, "--compile: not supported for detectors, which would recompile for every image size"),
    (lambda a: a.drop, "--drop: detectors have no classifier for dropout"),
]


def derived(args: Mapping[str, Any]) -> dict[str, Any]:
    """Derive the data set from --data-path."""
    return {"data_set": "COCO" if args["data_path"] else "NUCLEI"}


FLAGS = TaskFlags(TABLE, lambda _given: {}, derived, CHECKS)
