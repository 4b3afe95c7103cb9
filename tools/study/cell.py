"""One run of a study: training as the mains do it, begun with the weights that all cells of a seed share.

python -m tools.study.cell FLAGS    the flags of main_spectformer.py
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import torch
from torch import nn

import engine
from models.base import ImageModel
from runtime.entry_point import run_cli
from training.classification import Classification, full_model_kwargs
from training.model import create_model
from training.options import MIXER_CHOICES, parse_args
from training.trainer import Run
from utils import UserError

STUDY = "STUDY_PIPE"  # the environment's name of a pipe that ends when the study does
OF_MIXERS = (*MIXER_CHOICES, "mixer_options", "wavelet_backend")


class Cell(Classification):
    """Classification by a model that begins with the same weights as all others of its seed, but for its mixers'."""

    def __init__(self, run: Run):
        super().__init__(run)
        if run.checkpoint is None:
            model = without_mixers(self.model, run, self.data.num_classes)
            self.model.load_state_dict(model.state_dict(), strict=False)


def without_mixers(model: nn.Module, run: Run, num_classes: int) -> ImageModel:
    """The model as it is without any mixer, which the seed alone gives its weights.

    Raises:
        UserError: it is none of ours, so what a mixer is in it is not known.
    """
    if not isinstance(model, ImageModel):
        raise UserError(f"--arch {run.args.arch}: a study compares mixers, of this project's models")
    stages = [stage.blocks for stage in model.stages] if hasattr(model, "stages") else [model.blocks]
    arguments = {name: value for name, value in full_model_kwargs(run.args).items() if name not in OF_MIXERS}
    arguments["mixers"] = "/".join(f"none*{len(blocks)}" for blocks in stages)
    torch.manual_seed(run.args.seed)
    return create_model(run.args.arch, num_classes, run.args.input_size, arguments)


def end_with_study() -> None:
    """Leave at once when the study that started this run is killed; its next start goes on with the run."""
    if STUDY not in os.environ:
        return
    pipe = os.fdopen(int(os.environ.pop(STUDY)), "rb")

    def watch() -> None:
        pipe.read()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str] | None = None) -> None:
    end_with_study()
    engine.fit(Cell, parse_args(Classification.flags, argv, None, __doc__))


if __name__ == "__main__":
    run_cli(main)
