"""Fine-tune pre-trained weights on another data set, with a new classifier; all other weights must match."""

from collections.abc import Sequence

import engine
from runtime.cli import run_cli
from training.classification import Classification
from training.options import parse_args

RECIPE = "configs/transfer/transfer.yaml"  # as published, for eight GPUs and hundreds of epochs
ONE_MACHINE = "configs/one_machine_finetune.yaml"  # without --lr on the command line


def main(argv: Sequence[str] | None = None) -> None:
    engine.fit(Classification, parse_args(Classification.flags, argv, RECIPE, __doc__, ONE_MACHINE))


if __name__ == "__main__":
    run_cli(main)
