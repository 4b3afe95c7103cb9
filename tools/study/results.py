"""The results of a study: a line of JSON for each run that has ended, in a file to be committed."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch

from models import load_checkpoint
from models.flops import count_flops
from runtime.run_directory import read_log
from runtime.schema import parse_json
from tools import machine
from training.model import count_parameters
from training.resume import LAST, difference
from utils import UserError, atomic_write, make_directory

from .definition import Study

Line = dict[str, Any]
NUMBERS = ("acc1", "acc5", "loss", "parameters", "gflops", "seconds", "images", "test_images", "classes")


def read_lines(path: Path) -> list[Line]:
    """The lines of a file, none if it is not there.

    Raises:
        UserError: one is none of a study.
    """
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else (), 1):
        try:
            line = parse_json(text)
            whole = isinstance(line["cell"], str) and isinstance(line["recipe"], dict) and type(line["seed"]) is int
            if not whole or not all(isinstance(line[name], (int, float)) for name in NUMBERS):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: line {number} is no result of a study") from error
        lines.append(line)
    return lines


def lines_of(study: Study, path: Path) -> list[Line]:
    """The study's lines of a file, in the order of its cells and seeds.

    Raises:
        UserError: some were trained by another recipe; see also `read_lines`.
    """
    lines = {(line["cell"], line["seed"]): line for line in read_lines(path)}
    found = [lines[cell, seed] for cell in study.cells for seed in range(study.seeds) if (cell, seed) in lines]
    for line in found:
        recipe = study.recipe(line["cell"])
        if line["recipe"] != recipe:
            raise UserError(
                f"{path}: {line['cell']}, seed {line['seed']} was trained with another recipe: "
                f"{difference(line['recipe'], recipe)}; results of another one go to another --page"
            )
    return found


def add_line(path: Path, line: Line) -> None:
    """Put a result into the file, sorted, so that the order in which runs end does not show."""
    lines = {(other["cell"], other["seed"]): other for other in read_lines(path)} | {(line["cell"], line["seed"]): line}
    make_directory(path.parent)
    atomic_write(path, "".join(json.dumps(lines[key]) + "\n" for key in sorted(lines)))


def result_of(study: Study, cell: str, seed: int, directory: Path, device: str) -> Line:
    """What a run that has ended came to, in its last epoch: the best one is chosen by the test images themselves."""
    rows = read_log(directory / "log.txt")
    info = load_checkpoint(directory / LAST)
    model = info.model
    last: Mapping[str, Any] = rows[-1]
    return {
        "cell": cell,
        "seed": seed,
        "acc1": round(last["test_acc1"], 4),
        "acc5": round(last["test_acc5"], 4),
        "loss": last["test_loss"],
        "train_loss": last["train_loss"],
        "parameters": count_parameters(model),
        "gflops": round(count_flops(model, info.input_size) / 1e9, 6),
        "images": rows[0]["samples_seen"],
        "test_images": last["test_images"],
        "classes": info.num_classes,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "finished": time.strftime("%Y-%m-%d"),
        "machine": describe_device(device),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "recipe": study.recipe(cell),
    }


def describe_device(device: str) -> str:
    """What a run was trained on, in words."""
    if device == "cpu":
        return f"one core of {machine.processor()}"
    return torch.cuda.get_device_name(device)
