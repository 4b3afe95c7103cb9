"""Fine-tune pre-trained weights on another data set, with a new classifier; all other weights must match."""

from collections.abc import Sequence

import engine
from runtime.cli import run_cli
from training.classification import Classification
from training.options import parse_args

# As published, for eight GPUs and hundreds of epochs; and for one machine, without --lr on the command line.
RECIPES = ("configs/transfer/transfer.yaml", "configs/one_machine_finetune.yaml")


def main(argv: Sequence[str] | None = None) -> None:
    engine.fit(Classification, parse_args(Classification.flags, argv, RECIPES, __doc__))


if __name__ == "__main__":
    run_cli(main)
