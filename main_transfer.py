"""Transfer pre-trained weights to another data set: the classifier is new, everything else has to load."""

from __future__ import annotations

from collections.abc import Sequence

import engine
from cli import parse_args
from datasets import build_data
from utils import run_cli

DEFAULTS = {
    "classifier": "new",
    "finetune_mode": "train",
    "batch_size": 64,
    "epochs": 1000,
    "lr": 1e-4,
    "weight_decay": 1e-4,
}


def main(argv: Sequence[str] | None = None) -> None:
    with engine.start(parse_args(argv, DEFAULTS, __doc__)) as run:
        data = build_data(run.args, run.dist)
        engine.fit(run, engine.build_model(run, data), data)


if __name__ == "__main__":
    run_cli(main)
