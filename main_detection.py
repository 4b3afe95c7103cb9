"""Train a detector on a pyramid backbone of this project or of timm, with the Mask R-CNN 1x recipe."""

from collections.abc import Sequence

import engine
from detection.task import Detection
from runtime.cli import run_cli
from training.options import parse_args

RECIPES = ("configs/detection/mask_rcnn_1x.yaml",)


def main(argv: Sequence[str] | None = None) -> None:
    engine.fit(Detection, parse_args(Detection.flags, argv, RECIPES, __doc__))


if __name__ == "__main__":
    run_cli(main)
