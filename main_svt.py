"""Train an SVT, or any timm model, with the recipe of the four-stage models and optional token labels."""

from collections.abc import Sequence

import engine
from runtime.cli import run_cli
from training.classification import Classification
from training.options import parse_args

RECIPES = ("configs/svt/svt_s.yaml",)


def main(argv: Sequence[str] | None = None) -> None:
    engine.fit(Classification, parse_args(Classification.flags, argv, RECIPES, __doc__))


if __name__ == "__main__":
    run_cli(main)
