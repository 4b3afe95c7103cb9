"""What a study is: its file, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from runtime.provenance import plain
from training.arguments import read_yaml, suggestion, words_of
from training.classification_flags import FLAGS
from training.model import create_model
from training.options import build_parser, merged, parse_args
from utils import UserError

MOST_SEEDS = 1000
# Flags that say where and how a run goes, not what it computes; and those that a study sets itself.
MACHINE = ("data_path", "download", "num_workers", "pin_mem", "print_freq", "checkpoint_steps", "compile", "wandb")
SETTLED = ("config", "seed", "output_dir", "resume", "device", "eval", "dry_run", "print_config", "finetune", "mixers")
KEYS = {"title": str, "data": str, "seeds": int, "against": str, "recipe": dict, "cells": dict}
NEEDED = ("title", "data", "seeds", "recipe", "cells")


@dataclass(frozen=True)
class Study:
    """A table to fill.

    name: the file's. title, data: for its readers. seeds: runs of each cell. against: the argument of the model along
    which the cells are drawn, or None. cells: their names and what the model has there (arguments of its constructor).
    flags: the command line that all runs share. settings: what of it decides the result, the model's arguments aside.
    model_kwargs: those that all cells share.
    """

    name: str
    title: str
    data: str
    seeds: int
    against: str | None
    cells: Mapping[str, Mapping[str, Any]]
    flags: tuple[str, ...]
    settings: Mapping[str, Any]
    model_kwargs: Mapping[str, Any]

    def model_arguments(self, cell: str) -> dict[str, Any]:
        """Those of a cell's model."""
        return merged(dict(self.model_kwargs), dict(self.cells[cell]))

    def command(self, cell: str, seed: int, directory: Path, device: str) -> list[str]:
        """The words after `python` that train a cell."""
        arguments = [f"{name}={value!r}" for name, value in self.model_arguments(cell).items()]
        own = ["--seed", str(seed), "--output-dir", str(directory), "--resume", "auto", "--device", device]
        return ["-m", "tools.study.cell", *self.flags, "--model-kwargs", *arguments, *own]

    def recipe(self, cell: str) -> dict[str, Any]:
        """All that decides a cell's results but the seed."""
        return plain(self.settings | {"model_kwargs": self.model_arguments(cell)})


def read_study(path: Path, flags: Sequence[str] = (), seeds: int | None = None) -> Study:
    """The study that a YAML file describes.

    Args:
        path: the file.
        flags: training's, which go before those of the file.
        seeds: instead of the file's.

    Raises:
        UserError: the file, a key, a flag or an argument of a cell's model is wrong.
    """
    content = read_yaml(path, str(path))
    for key, value in content.items():
        if key not in KEYS:
            raise UserError(f"{path}: unknown key {str(key)[:40]!r}{suggestion(str(key), KEYS)}")
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise UserError(f"{path}: {key} has to be {KEYS[key].__name__}, not {value!r:.60}")
    if missing := [key for key in NEEDED if not content.get(key)]:
        raise UserError(f"{path}: {missing[0]} is missing")
    if not 0 < content["seeds"] <= MOST_SEEDS:
        raise UserError(f"{path}: seeds counts the runs of a cell, from 1 to {MOST_SEEDS}")
    for name, arguments in content["cells"].items():
        if not (isinstance(name, str) and isinstance(arguments, dict) and all(map(_is_name, arguments))):
            raise UserError(f"{path}: cells: {name!r:.40} has to be a name with a mapping of the model's arguments")
    parser = build_parser(FLAGS)
    given = parser.given([*words_of(content["recipe"], parser, f"{path}: recipe"), *flags])
    for name in given:
        if name in SETTLED:
            raise UserError(f"{path}: --{name.replace('_', '-')} is what the study sets itself, run by run")
    model_kwargs = given.pop("model_kwargs", {})
    recipe = {name: value for name, value in content["recipe"].items() if name.replace("-", "_") != "model_kwargs"}
    study = Study(
        name=path.stem,
        title=content["title"],
        data=content["data"],
        seeds=seeds or content["seeds"],
        against=content.get("against"),
        cells=content["cells"],
        flags=(*words_of(recipe, parser, str(path)), *flags),
        settings={name: value for name, value in sorted(given.items()) if name not in MACHINE},
        model_kwargs=model_kwargs,
    )
    _check_models(study, path)
    return study


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and key.isidentifier()


def _check_models(study: Study, path: Path) -> None:
    for cell in study.cells:
        words = study.command(cell, 0, Path("unused"), "cpu")
        try:
            args = parse_args(FLAGS, words[2:])
            with torch.device("meta"):
                create_model(args.arch, 10, args.input_size, args.model_kwargs)
        except UserError as error:
            raise UserError(f"{path}: cells: {cell}: {error}") from error
