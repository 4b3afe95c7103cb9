"""Train every cell of a table of models under equal conditions, and write the results.

    python -m tools.study STUDY.yaml --data-path DIR [flags of training]

STUDY.yaml contains the cells and one recipe for all; flags on the command line override the recipe. All cells share
the data, budget, schedule and augmentation. For each seed, all cells start from the same weights, except for their
mixers. A cell is a mapping of model arguments; `arch` selects another model, such as one of timm's. Runs are
parallel: one per GPU, or one single-threaded run per core. A study that was stopped or killed can be resumed.

Each finished run is a line of OUTPUT/STUDY.jsonl. Commit that file to continue the study on another machine. If the
recipe changes, all cells are trained again. OUTPUT/STUDY.md and .png contain the table and the plot.
"""

import argparse
import hashlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from multiprocessing.pool import ThreadPool
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import engine
from inference.output_files import save_figure
from models import ModelError, create_model, load_checkpoint
from models.base import ImageModel
from models.flops import count_flops
from models.pretrained import LAST
from runtime.cli import run_cli
from runtime.provenance import plain, read_yaml
from tools.contenders import time_in_turns
from tools.machine import processor
from training.arguments import POSITIVE, Parser, words_of
from training.classification import Classification, full_model_kwargs
from training.model import count_parameters
from training.options import available_cores, build_parser, merged_model_kwargs, parse_args
from training.precision import choose_precision
from training.trainer import Run
from utils import UserError, atomic_write, make_directory, say

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"title": str, "data": str, "seeds": int, "recipe": dict, "cells": dict, "against": str}
# Settings that do not affect a run's results.
MACHINE = {
    "config", "data_path", "download", "num_workers", "pin_mem", "print_freq", "checkpoint_steps", "checkpoint_epochs",
    "compile", "wandb",
}  # fmt: skip
RESULT = "study.json"  # in the directory of each finished run
ROUNDS = 9  # measurements of inference

Line = dict[str, Any]


class Study:
    """A study, read from a YAML file and checked.

    Attributes:
        cells: name -> the model's arguments, and its `arch` if it differs from the recipe's.
        words, args: name -> the command line of the cell's runs without seed, device and output, and its values.
        recipes: name -> the settings that determine the cell's results, except for the seed.
    """

    def __init__(self, path: Path, flags: Sequence[str], seeds: int | None, runs: Path):
        """Raises UserError, which names the invalid file, key, flag or model argument."""
        content = {"against": ""} | read_yaml(path, str(path))
        for key in KEYS | content:
            if not isinstance(content.get(key), KEYS.get(key, ())):
                keys = ", ".join(f"{name} ({kind.__name__})" for name, kind in KEYS.items())
                raise UserError(f"{path}: {str(key)[:40]!r} is missing, unknown or of a wrong type; expected {keys}")
        self.path, self.name, self.runs, self.content = path, path.stem, runs / path.stem, content
        self.seeds, self.cells = seeds or content["seeds"], content["cells"]
        self.words, self.args, self.recipes = {}, {}, {}
        parser = build_parser(Classification.flags)
        recipe = {key.replace("-", "_"): value for key, value in content["recipe"].items()}
        for cell, arguments in self.cells.items():
            try:
                if not isinstance(arguments, dict):
                    raise UserError("a cell must be a mapping of model arguments; {} for none")
                own = {key: value for key, value in arguments.items() if key != "arch"}
                if "arch" in arguments:  # the recipe's model arguments are for another model
                    own_flags = {"arch": arguments["arch"], "model_kwargs": own}
                else:
                    own_flags = {"model_kwargs": merged_model_kwargs(recipe, {"model_kwargs": own})}
                self.words[cell] = words = [*words_of(recipe | own_flags, parser), *flags]
                self.args[cell] = args = parse_args(Classification.flags, words)
                with torch.device("meta"):
                    create_model(args.arch, 10, args.input_size, args.model_kwargs)
            except (UserError, ModelError) as error:
                raise UserError(f"{path}: cells: {cell}: {error}") from error
            given = sorted(parser.given(words).items())
            self.recipes[cell] = {name: plain(value) for name, value in given if name not in MACHINE}

    def directory(self, cell: str, seed: int) -> Path:
        """Return the run directory; its name contains a digest of the recipe."""
        digest = hashlib.sha256(json.dumps(self.recipes[cell]).encode()).hexdigest()[:8]
        return self.runs / f"{re.sub(r'[^a-z0-9]+', '-', cell.lower()).strip('-')}-seed{seed}-{digest}"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["cell"]:
        return train_cell(argv[1:])
    parser = Parser(__doc__, prog="python -m tools.study")
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="the study; must be the first argument")
    add("--output", type=Path, default=Path("docs/studies"), metavar="DIR", help="folder of the results")
    add("--runs", type=Path, default=Path("runs/studies"), metavar="DIR", help="folder of the run directories")
    add("--workers", type=POSITIVE, metavar="N", help="parallel runs (default: one per GPU, or one per core)")
    add("--seeds", type=POSITIVE, metavar="N", help="runs per cell (default: from STUDY.yaml)")
    add("--report", action="store_true", help="only write table and plot of the finished runs")
    args, flags = parser.parse_known_args(argv)
    study = Study(args.study, flags, args.seeds, args.runs)
    make_directory(args.output)
    results = args.output / f"{study.name}.jsonl"
    lines = read_lines(study, results)
    jobs = [(cell, seed) for seed in range(study.seeds) for cell in study.cells if (cell, seed) not in lines]
    if not args.report:
        train(study, jobs, results, args.workers)
        lines = read_lines(study, results)
    write_report(study, lines, args.output)
    say(f"{args.output / study.name}.md: {len(lines)} of {len(study.cells) * study.seeds} runs")


# ----------------------------------------------------------------------------------------------------------- training


def train_cell(argv: Sequence[str]) -> None:
    """Run training and write RESULT; the process exits when the study does, even if that is killed."""

    def end_with_study() -> None:
        os.read(sys.stdin.fileno(), 1)  # blocks until the study's end of the pipe is closed
        os._exit(1)

    threading.Thread(target=end_with_study, daemon=True).start()
    args = parse_args(Classification.flags, argv)
    engine.fit(Cell, args)
    directory = Path(args.output_dir)
    rows = [json.loads(row) for row in (directory / "log.txt").read_text(encoding="utf-8").splitlines()]
    loaded = load_checkpoint(directory / LAST)
    result = {
        "acc1": round(rows[-1]["test_acc1"], 4),  # not the best epoch's, which the test images would select
        "parameters": count_parameters(loaded.model),
        "gflops": round(count_flops(loaded.model, loaded.input_size, args.in_chans) / 1e9, 6),
        "images": rows[0]["samples_seen"],
        "test_images": rows[-1]["test_images"],
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "inference_images_per_s": round(inference_rate(loaded.model, args), 1),
        "machine": f"one core of {processor()}" if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "torch": torch.__version__,
    }
    atomic_write(directory / RESULT, json.dumps(result))


def inference_rate(model: nn.Module, args: argparse.Namespace) -> float:
    """Measure the median images/s of inference, with training's batch size and precision."""
    device = torch.device(args.device)
    precision = choose_precision(args, device)
    model.to(device)
    images = torch.randn(args.batch_size, args.in_chans, *args.input_size, device=device)

    def run() -> None:
        with torch.inference_mode(), precision.autocast():
            model(images)

    seconds = time_in_turns({"inference": run}, ROUNDS, device.type)
    return args.batch_size / statistics.median(seconds["inference"])


class Cell(Classification):
    """Classification whose initial weights depend only on the seed, except for the mixers'."""

    def __init__(self, run: Run):
        super().__init__(run)
        if run.checkpoint is None and isinstance(self.model, ImageModel):
            stages = getattr(self.model, "stages", [self.model])
            own = {"model_kwargs": full_model_kwargs(run.args)}
            none = {"mixers": "/".join(f"none*{len(stage.blocks)}" for stage in stages)}
            torch.manual_seed(run.args.seed)
            arguments = merged_model_kwargs(own, {"model_kwargs": none})
            model = create_model(run.args.arch, len(self.class_names), run.args.input_size, arguments)
            self.model.load_state_dict(model.state_dict(), strict=False)


def train(study: Study, jobs: list[tuple[str, int]], results: Path, workers: int | None) -> None:
    """Run the jobs (cell, seed) in parallel on the free devices, and append a line to `results` for each.

    Raises:
        UserError: a run failed; the others are stopped, and the next call resumes them.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    workers = workers or (available_cores() if gpus == ["cpu"] else len(gpus))
    say(f"{study.name}: {len(jobs)} runs, {workers} in parallel on {', '.join(gpus)}")
    free: SimpleQueue[str] = SimpleQueue()
    for index in range(workers):
        free.put(gpus[index % len(gpus)])
    with ThreadPool(workers) as pool:
        for done, line in enumerate(pool.imap_unordered(partial(train_one, study, free), jobs), 1):
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            say(f"{line['cell']}, seed {line['seed']}: top-1 {line['acc1']:.2f} % ({done} of {len(jobs)})")


def train_one(study: Study, free: SimpleQueue[str], job: tuple[str, int]) -> Line:
    """Train a cell with a seed in a subprocess on a free device; returns the line of results.

    On a CPU the process has one thread, so that its results do not depend on the number of cores.
    """
    cell, seed = job
    directory = study.directory(cell, seed).resolve()
    make_directory(directory.parent)
    console = directory.with_suffix(".log")
    own = ["--seed", str(seed), "--output-dir", str(directory), "--resume", "auto"]
    device = free.get()
    command = [sys.executable, "-m", "tools.study", "cell", *study.words[cell], *own, "--device", device]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {}
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT}  # stdin is closed when the study ends
    with console.open("ab") as out:
        code = subprocess.Popen(command, cwd=ROOT, env=os.environ | threads, stdout=out, **pipes).wait()
    free.put(device)
    if code:
        last = console.read_text(errors="replace").strip().rpartition("\n")[2]
        raise UserError(f"{cell}, seed {seed}: {last} (exit status {code}, see {console})")
    result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
    return {"cell": cell, "seed": seed} | result | {"recipe": study.recipes[cell]}


def read_lines(study: Study, path: Path) -> dict[tuple[str, int], Line]:
    """Read the results by cell and seed, without those of other recipes."""
    texts = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = [line for line in map(json.loads, texts) if line["recipe"] == study.recipes.get(line["cell"])]
    return {(line["cell"], line["seed"]): line for line in lines if line["seed"] < study.seeds}


# ------------------------------------------------------------------------------------------------------------- report


def least_difference(scores: Tensor) -> float:
    """Return twice the standard error of the difference between two cells' means; nan for one seed.

    The noise is the part of a run's accuracy that neither its cell nor its seed explains: the runs of a seed share
    their data and initial weights, which affect all cells equally.

    Args:
        scores: (cells, seeds).
    """
    cells, seeds = scores.shape
    noise = scores - scores.mean(1, keepdim=True) - scores.mean(0) + scores.mean()
    variance = noise.square().sum().item() / max((cells - 1) * (seeds - 1), 1)
    return 2 * math.sqrt(2 * variance / seeds) if seeds > 1 else math.nan


def write_report(study: Study, lines: dict[tuple[str, int], Line], folder: Path) -> None:
    """Write STUDY.md (data, budget, machine, table) and STUDY.png for the seeds trained in every cell."""
    seeds = [seed for seed in range(study.seeds) if all((cell, seed) in lines for cell in study.cells)]
    if not seeds:
        raise UserError(f"{folder}: no seed of {study.path} has been trained in every cell")
    scores = torch.tensor([[lines[cell, seed]["acc1"] for seed in seeds] for cell in study.cells])
    means, spreads = scores.mean(1).tolist(), scores.std(1, correction=min(1, len(seeds) - 1)).tolist()
    rates: dict[str, list[float]] = {"images/s in training": [], "images/s in inference": []}  # nan if not measured
    training, inference = rates.values()
    table = f"| cell | top-1 % | parameters | GFLOPs | {' | '.join(rates)} |\n{'| --- ' * (4 + len(rates))}|\n"
    for cell, mean, spread in zip(study.cells, means, spreads, strict=True):
        of_cell, args = [lines[cell, seed] for seed in seeds], study.args[cell]
        line = of_cell[0]
        training.append(args.epochs * line["images"] / statistics.median(line["seconds"] for line in of_cell))
        inference.append(statistics.median(line.get("inference_images_per_s", math.nan) for line in of_cell))
        table += f"| {cell} | {mean:.2f} ± {spread:.2f} | {line['parameters']:,} | {line['gflops']:.4f} "
        table += f"| {training[-1]:.0f} | {inference[-1]:.0f} |\n"
    machines = ", ".join(sorted({line["machine"] for line in lines.values()}))
    title = study.content["title"]
    least = least_difference(scores)
    error = f"\nTwice the standard error of a difference between two means is {least:.2f}." if len(seeds) > 1 else ""
    text = f"""# {title}

Data: {study.content["data"]}.
Budget: {args.epochs} epoch(s) of {line["images"]:,} images, {len(seeds)} of {study.seeds} seeds.
Machine: {machines}; torch {line["torch"]}.

    python -m tools.study {study.path} --data-path DIR

Top-1 accuracy on {line["test_images"]:,} test images after the last epoch, mean ± standard deviation over the seeds.
All cells have the same data, budget, schedule and augmentation. For each seed they start from the same weights, except
for their mixers.{error} Images/s are medians over the seeds; inference uses batches of {args.batch_size} images.

{table}
![{title}]({study.name}.png)
"""
    atomic_write(folder / f"{study.name}.md", text)
    save_figure(folder / f"{study.name}.png", draw(study, means, spreads, rates))


def draw(study: Study, means: list[float], spreads: list[float], rates: dict[str, list[float]]) -> Figure:
    """Plot accuracy against the model argument in the study's `against`, and against the measured images/s."""
    against = study.content["against"]
    panels = {against: [arguments.get(against, math.nan) for arguments in study.cells.values()]} if against else {}
    panels |= {name: values for name, values in rates.items() if not any(map(math.isnan, values))}
    figure = Figure(figsize=(1.5 + 5.5 * len(panels), 4.5), layout="constrained")
    for axes, (name, positions) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        points = zip(study.cells, positions, means, spreads, cycle("osD^vP*"), strict=False)
        for cell, position, mean, spread, marker in points:
            axes.errorbar(position, mean, spread, fmt=marker, capsize=3, label=cell)
        axes.set(xlabel=name, ylabel="Top-1 accuracy (%)")
        axes.grid(alpha=0.3)
    figure.suptitle(study.content["title"], fontsize=11)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    run_cli(main)
