"""Train an SVT, or any timm model, by the recipe of the four-stage models, with or without token labels."""

from __future__ import annotations

from collections.abc import Sequence

import engine
from cli import parse_args
from datasets import build_data
from utils import run_cli

DEFAULTS = {
    "arch": "svt_h_s",
    "epochs": 310,
    "reprob": 0.25,
    "clip_grad": 0.0,
    "repeated_aug": True,
    "eval_crop_pct": 0.96,
    "keep_best": 10,
}


def main(argv: Sequence[str] | None = None) -> None:
    with engine.start(parse_args(argv, DEFAULTS, __doc__)) as run:
        data = build_data(run.args, run.dist)
        engine.fit(run, engine.build_model(run, data), data)


if __name__ == "__main__":
    run_cli(main)
