"""How fast the models of a study's cells are, measured side by side."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from runtime.schema import parse_json
from tools.benchmark.contenders import Contender, Runner
from tools.benchmark.settings import Settings
from tools.benchmark.stopwatch import take_turns
from training.classification_flags import FLAGS
from training.model import create_model
from training.options import parse_args
from utils import UserError, atomic_write, make_directory

from .definition import Study
from .results import describe_device

ROUNDS = 9
DTYPES = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}

Speeds = dict[str, Any]


@dataclass(frozen=True)
class CellModel(Contender):
    """A cell's model, to be measured."""

    arguments: tuple[tuple[str, Any], ...] = ()

    def build(self) -> nn.Module:
        side = self.settings.img_size
        model = create_model(self.model, self.num_classes, (side, side), dict(self.arguments))
        return model.to(self.settings.device)


def measure_speeds(study: Study, num_classes: int, device: str) -> Speeds:
    """Images/s of every cell, in training and in inference, in batches of the recipe's size; on a CPU by one thread.

    The models take turns, so that what else the machine does hits all alike; the figures are medians.
    """
    runners = []
    for cell in study.cells:
        args = parse_args(FLAGS, study.command(cell, 0, Path("unused"), "cpu")[2:])
        dtype = DTYPES.get(args.amp, "bfloat16" if device == "cuda" else "float32")
        settings = Settings(device, dtype, batch_size=args.batch_size, img_size=args.input_size[0])
        arguments = tuple(args.model_kwargs.items())
        runners.append(Runner(CellModel(cell, args.arch, settings, num_classes, arguments)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        figures: dict[str, dict[str, float]] = {runner.contender.label: {} for runner in runners}
        for part in ("inference", "training"):
            seconds = take_turns({runner.contender.label: runner.task(part) for runner in runners}, ROUNDS, device)
            for runner in runners:
                rate = runner.settings.batch_size / statistics.median(seconds[runner.contender.label])
                figures[runner.contender.label][part] = round(rate, 1)
    finally:
        torch.set_num_threads(threads)
    return {"machine": describe_device(device), "batch_size": runners[0].settings.batch_size, "images_per_s": figures}


def write_speeds(path: Path, speeds: Speeds) -> None:
    make_directory(path.parent)
    atomic_write(path, json.dumps(speeds, indent=1) + "\n")


def read_speeds(path: Path) -> Speeds | None:
    """What `write_speeds` wrote; None if it is not there.

    Raises:
        UserError: it is something else.
    """
    if not path.exists():
        return None
    try:
        speeds = parse_json(path.read_text(encoding="utf-8"))
        if not all(isinstance(speeds[key], kind) for key, kind in (("machine", str), ("images_per_s", dict))):
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: it holds no speeds of a study; remove it to measure them") from error
    return speeds
