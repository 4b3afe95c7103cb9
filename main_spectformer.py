"""Train a SpectFormer (vanilla or hierarchical), or any timm model, by the vanilla recipe."""

from __future__ import annotations

from collections.abc import Sequence

import engine
from cli import parse_args
from datasets import build_data
from utils import run_cli

DEFAULTS = {"arch": "spectformer_xs"}


def main(argv: Sequence[str] | None = None) -> None:
    with engine.start(parse_args(argv, DEFAULTS, __doc__)) as run:
        data = build_data(run.args, run.dist)
        engine.fit(run, engine.build_model(run, data), data)


if __name__ == "__main__":
    run_cli(main)
