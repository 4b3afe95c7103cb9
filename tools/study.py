"""Train every cell of a table on equal terms, and write what came out.

    python -m tools.study STUDY.yaml --data-path DIR [flags of training]

STUDY.yaml names the cells and their one recipe; flags on the command line override the recipe. All cells have the same
data, budget, schedule and augmentation, and those of a seed start from the same weights, except for their mixers'. A
cell is a mapping of model arguments; with `arch` it is another model, such as one of timm's. Runs go side by side: one
on each GPU, or one single-threaded run on each core. A study that was stopped or killed resumes where it was.

Each finished run becomes a line of OUTPUT/STUDY.jsonl: commit it, and another machine can continue the study. When all
runs are there, the speed of the cells is measured; OUTPUT/STUDY.md and .png are the table and the plot.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import engine
from inference.output_files import save_figure
from models import load_checkpoint
from models.base import ImageModel
from models.flops import count_flops
from runtime.cli import run_cli
from tools.command_line import ToolParser, cores, processor
from tools.contenders import Contender, Settings, measure, size_argument
from training.arguments import POSITIVE, dashed, read_yaml, suggestion
from training.classification import Classification, full_model_kwargs
from training.model import count_parameters, create_model
from training.options import parse_args
from training.trainer import Run
from utils import JobError, NonFiniteError, UserError, atomic_write, make_directory, say

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"title": str, "data": str, "seeds": int, "recipe": dict, "cells": dict, "against": str}
# Settings that say where and how a run goes, not what it computes.
MACHINE = {
    "config", "data-path", "download", "num-workers", "pin-mem", "print-freq", "checkpoint-steps", "checkpoint-epochs",
    "compile", "wandb",
}  # fmt: skip
MIXER_ARGUMENTS = {"alpha", "spectral_depths", "mixer", "mixing", "mixers", "mixer_options", "wavelet_backend"}
SPEED_ROUNDS = 9
DTYPES = {"none": "float32", "bf16": "bfloat16", "fp16": "float16"}

Line = dict[str, Any]


class RunFailed(JobError):
    """A run ended with an error; the study ends with the same code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code if code > 0 else 128 - code


class Study:
    """A table to fill, read from a YAML file and checked.

    Attributes:
        cells: by name, the arguments of the model, and its `arch` where it is not the recipe's.
        recipes: by name, the flags that decide the cell's results, except for the seed.
    """

    def __init__(self, path: Path, flags: Sequence[str], seeds: int | None, runs: Path):
        """Raises UserError naming what is wrong: the file, a key, a flag or an argument of a cell's model."""
        content = read_yaml(path, str(path))
        for key, value in content.items():
            if key not in KEYS:
                raise UserError(f"{path}: unknown key {str(key)[:40]!r}{suggestion(str(key), KEYS)}")
            if not isinstance(value, KEYS[key]):
                raise UserError(f"{path}: {key} has to be of type {KEYS[key].__name__}, not {value!r:.60}")
        if missing := [key for key in KEYS if key != "against" and not content.get(key)]:
            raise UserError(f"{path}: {missing[0]} is missing")
        self.path, self.name, self.flags, self.runs = path, path.stem, flags, runs / path.stem
        self.title, self.data, self.against = content["title"], content["data"], content.get("against")
        self.seeds, self.cells = seeds or content["seeds"], content["cells"]
        self._recipe = {key.replace("_", "-"): value for key, value in content["recipe"].items()}
        self.recipes = {cell: self._checked_recipe(cell) for cell in self.cells}

    def _checked_recipe(self, cell: str) -> dict[str, str]:
        if not isinstance(self.cells[cell], dict):
            raise UserError(f"{self.path}: cells: {cell} has to be a mapping of model arguments")
        try:
            args = self.arguments(cell)
            with torch.device("meta"):
                create_model(args.arch, 10, args.input_size, args.model_kwargs)
        except UserError as error:
            raise UserError(f"{self.path}: cells: {cell}: {error}") from error
        settings: dict[str, list[str]] = {}
        for word in self.words(cell):
            if word.startswith("--"):
                name, _, word = word[2:].partition("=")
                settings[name] = []
            settings[name] += [word] if word else []
        return {name: " ".join(values) for name, values in sorted(settings.items()) if name not in MACHINE}

    def arguments(self, cell: str) -> argparse.Namespace:
        return parse_args(Classification.flags, self.words(cell))

    def words(self, cell: str) -> list[str]:
        """The command line of a cell's runs, but for what is a single run's own."""
        own = dict(self.cells[cell])
        arch = own.pop("arch", None)
        shared = {} if arch else self._recipe.get("model-kwargs", {})
        if MIXER_ARGUMENTS & own.keys():
            shared = {name: value for name, value in shared.items() if name not in MIXER_ARGUMENTS}
        settings = self._recipe | ({"arch": arch} if arch else {}) | {"model-kwargs": shared | own}
        words = []
        for name, value in settings.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            elif isinstance(value, dict):
                words += [f"--{name}", *(f"{key}={item!r}" for key, item in value.items())] if value else []
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return [*words, *self.flags]

    def directory(self, cell: str, seed: int) -> Path:
        """Of a run; the digest keeps runs of different recipes apart."""
        digest = hashlib.sha256(json.dumps(self.recipes[cell], sort_keys=True).encode()).hexdigest()[:8]
        return self.runs / f"{re.sub(r'[^a-z0-9]+', '-', cell.lower()).strip('-')}-seed{seed}-{digest}"


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["cell"]:
        return train_cell(argv[1:])
    parser = ToolParser("study", __doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="the table to fill; comes first")
    add("--output", type=Path, default=Path("docs/studies"), metavar="DIR", help="results (default: %(default)s)")
    add("--runs", type=Path, default=Path("runs/studies"), metavar="DIR", help="run directories (default: %(default)s)")
    add("--workers", type=POSITIVE, metavar="N", help="runs side by side (default: one a GPU, or one a core)")
    add("--seeds", type=POSITIVE, metavar="N", help="runs of each cell (default: the file's)")
    add("--cells", nargs="+", metavar="NAME", help="train only these")
    add("--speed", action="store_true", help="train nothing and measure images/s again, on a quiet machine")
    add("--report", action="store_true", help="train nothing and write table and plot of what there is")
    args, flags = parser.parse_known_args([dashed(word) for word in argv])
    study = Study(args.study, flags, args.seeds, args.runs)
    for cell in args.cells or ():
        if cell not in study.cells:
            raise UserError(f"--cells {cell}: {args.study} has {', '.join(study.cells)}")
    make_directory(args.output)
    results, speed = args.output / f"{study.name}.jsonl", args.output / f"{study.name}_speed.json"
    lines = read_lines(study, results)
    if not (args.speed or args.report):
        jobs = [(cell, seed) for seed in range(study.seeds) for cell in args.cells or study.cells]
        train(study, [job for job in jobs if job not in lines], results, args.workers)
        lines = read_lines(study, results)
    if not lines:
        raise UserError(f"{results}: no results yet")
    if args.speed or (len(lines) == len(study.cells) * study.seeds and not speed.exists() and not args.report):
        atomic_write(speed, json.dumps(speeds_of(study, next(iter(lines.values()))["classes"]), indent=1) + "\n")
    write_report(study, lines, json.loads(speed.read_text()) if speed.exists() else None, args.output)
    say(f"{args.output / study.name}.md: {len(lines)} of {len(study.cells) * study.seeds} runs")


# ----------------------------------------------------------------------------------------------------------- training


def train_cell(argv: Sequence[str]) -> None:
    """One run, in a process of its own that ends when the study does, however that ends."""

    def end_with_study() -> None:
        os.read(sys.stdin.fileno(), 1)  # until the study's end of the pipe is closed
        os._exit(1)

    threading.Thread(target=end_with_study, daemon=True).start()
    engine.fit(Cell, parse_args(Classification.flags, argv))


class Cell(Classification):
    """Classification by a model that starts from the same weights as all of its seed, except for its mixers'."""

    def __init__(self, run: Run):
        super().__init__(run)
        if run.checkpoint is None and isinstance(self.model, ImageModel):
            self.model.load_state_dict(self._without_mixers(run).state_dict(), strict=False)

    def _without_mixers(self, run: Run) -> nn.Module:
        """The model without mixers, whose weights depend on the seed alone."""
        stages = [stage.blocks for stage in self.model.stages] if hasattr(self.model, "stages") else [self.model.blocks]
        arguments = {
            name: value for name, value in full_model_kwargs(run.args).items() if name not in MIXER_ARGUMENTS
        } | {"mixers": "/".join(f"none*{len(blocks)}" for blocks in stages)}
        torch.manual_seed(run.args.seed)
        return create_model(run.args.arch, self.data.num_classes, run.args.input_size, arguments)


def train(study: Study, jobs: list[tuple[str, int]], results: Path, workers: int | None) -> None:
    """Run the jobs, at most one a device or core at a time, and write a line for each that has ended.

    Raises:
        RunFailed: one ended with an error; after a loss that was not finite the others are trained first.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    free = [gpus[i % len(gpus)] for i in range(workers or (cores() if gpus == ["cpu"] else len(gpus)))]
    say(f"{study.name}: {len(jobs)} runs, {len(free)} side by side on {', '.join(dict.fromkeys(free))}")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    began, failed, done = time.perf_counter(), None, 0
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and free:
                job, device = waiting.pop(0), free.pop()
                running[start(study, *job, device)] = job, device
            process = next((process for process in running if process.poll() is not None), None)
            if process is None:
                time.sleep(0.05)
                continue
            (cell, seed), device = running.pop(process)
            free.append(device)
            done += 1
            if process.returncode:
                console = study.directory(cell, seed).with_suffix(".log")
                last = console.read_text(errors="replace").strip().rpartition("\n")[2]
                failed = RunFailed(f"{cell}, seed {seed}: {last} (see {console})", process.returncode)
                if process.returncode != NonFiniteError.exit_code:
                    raise failed
                say(f"error: {failed}")
                continue
            line = line_of(study, cell, seed, device)
            with results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            minutes = (time.perf_counter() - began) / 60 / done * (len(jobs) - done)
            say(f"{cell}, seed {seed}: top-1 {line['acc1']:.2f} % ({done} of {len(jobs)}, {minutes:.0f} minutes to go)")
    finally:
        for process in running:
            process.send_signal(signal.SIGTERM)  # it saves its state
        for process in running:
            process.wait()
    if failed:
        raise failed


def start(study: Study, cell: str, seed: int, device: str) -> subprocess.Popen:
    """A run's process. On a CPU it has one thread, so that its results do not depend on the other runs."""
    directory = study.directory(cell, seed)
    make_directory(directory.parent)
    own = ["--seed", str(seed), "--output-dir", str(directory.resolve()), "--resume", "auto", "--device", device]
    command = [sys.executable, "-m", "tools.study", "cell", *study.words(cell), *own]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if device == "cpu" else {}
    with directory.with_suffix(".log").open("ab") as console:
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | threads, stdin=subprocess.PIPE, stdout=console, stderr=console
        )


def line_of(study: Study, cell: str, seed: int, device: str) -> Line:
    """The results of a finished run, of its last epoch: the best one would be chosen by the test images themselves."""
    directory = study.directory(cell, seed)
    rows = [json.loads(row) for row in (directory / "log.txt").read_text(encoding="utf-8").splitlines()]
    loaded = load_checkpoint(directory / "checkpoint_last.pth")
    return {
        "cell": cell,
        "seed": seed,
        "acc1": round(rows[-1]["test_acc1"], 4),
        "loss": rows[-1]["test_loss"],
        "train_loss": rows[-1]["train_loss"],
        "parameters": count_parameters(loaded.model),
        "gflops": round(count_flops(loaded.model, loaded.input_size) / 1e9, 6),
        "images": rows[0]["samples_seen"],
        "test_images": rows[-1]["test_images"],
        "classes": loaded.num_classes,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "finished": time.strftime("%Y-%m-%d"),
        "machine": machine(device),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "recipe": study.recipes[cell],
    }


def machine(device: str) -> str:
    return f"one core of {processor()}" if device == "cpu" else torch.cuda.get_device_name(device)


def read_lines(study: Study, path: Path) -> dict[tuple[str, int], Line]:
    """The study's results in a file, by cell and seed; raises UserError where they are of another recipe."""
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        line = json.loads(text)
        key = cell, seed = line["cell"], line["seed"]
        if cell in study.cells and seed < study.seeds:
            lines[key] = line
            different = [
                f"--{name} {line['recipe'].get(name)}, not {study.recipes[cell].get(name)}"
                for name in sorted({*line["recipe"], *study.recipes[cell]})
                if line["recipe"].get(name) != study.recipes[cell].get(name)
            ]
            if different:
                raise UserError(
                    f"{path}: {cell}, seed {seed} was trained with {'; '.join(different)}; "
                    "write the results of another recipe to another --output"
                )
    return lines


def speeds_of(study: Study, num_classes: int) -> dict[str, Any]:
    """Images/s of every cell, which take turns, in batches of the recipe's size; on a CPU by one thread."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    contenders = []
    for cell in study.cells:
        args = study.arguments(cell)
        dtype = DTYPES.get(args.amp, "bfloat16" if device == "cuda" else "float32")
        settings = Settings(device, dtype, batch_size=args.batch_size, img_size=args.input_size[0])
        kwargs = size_argument(args.arch, args.input_size[0]) | args.model_kwargs
        contenders.append(Contender(cell, args.arch, settings, kwargs, num_classes))
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device == "cpu" else threads)
    seconds, _ = measure(contenders, SPEED_ROUNDS, ("inference", "training"))
    torch.set_num_threads(threads)
    rates = {
        cell: {part: round(settings.batch_size / statistics.median(times[cell]), 1) for part, times in seconds.items()}
        for cell in study.cells
    }
    return {"machine": machine(device), "batch_size": settings.batch_size, "images_per_s": rates}


# ------------------------------------------------------------------------------------------------------------- report


def least_difference(scores: Tensor) -> float:
    """The difference of two cells' means that chance does not explain: twice its standard error; nan for one seed.

    The noise is what neither its cell nor its seed explains of a run's accuracy: the runs of a seed share their data
    and initial weights, which moves all cells alike.

    Args:
        scores: (cells, seeds).
    """
    cells, seeds = scores.shape
    noise = scores - scores.mean(1, keepdim=True) - scores.mean(0) + scores.mean()
    variance = noise.square().sum().item() / max((cells - 1) * (seeds - 1), 1)
    return 2 * math.sqrt(2 * variance / seeds) if seeds > 1 else math.nan


def write_report(study: Study, lines: dict[tuple[str, int], Line], speeds: dict[str, Any] | None, folder: Path) -> None:
    """STUDY.md (data, budget, machine, table, verdict) and STUDY.png, of the seeds that all cells have."""
    seeds = [seed for seed in range(study.seeds) if all((cell, seed) in lines for cell in study.cells)]
    if not seeds:
        raise UserError(f"{folder}: no seed of {study.path} has been trained in every cell yet")
    scores = torch.tensor([[lines[cell, seed]["acc1"] for seed in seeds] for cell in study.cells])
    means, least = scores.mean(1).tolist(), least_difference(scores)
    spreads = scores.std(1).nan_to_num().tolist() if len(seeds) > 1 else [0.0] * len(means)
    best = means.index(max(means))
    head = ["cell", "top-1 %", "to the best", "parameters", "GFLOPs"]
    head += ["images/s, training", "inference"] if speeds else []
    rows, equal = [head, ["---"] * len(head)], []
    for cell, mean, spread in zip(study.cells, means, spreads, strict=True):
        line, gap = lines[cell, seeds[0]], mean - means[best]
        apart = "best" if gap == 0 else f"{gap:.2f}" if -gap >= least else "equal"
        equal += [cell] if apart == "equal" else []
        row = [cell, f"{mean:.2f} ± {spread:.2f}", apart, f"{line['parameters']:,}", f"{line['gflops']:.4f}"]
        row += [f"{speeds['images_per_s'][cell][part]:.0f}" for part in ("training", "inference")] if speeds else []
        rows.append(row)
    machines = ", ".join(sorted({line["machine"] for line in lines.values()}))
    minutes = statistics.median(line["seconds"] for line in lines.values()) / 60
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    measured = f" Images/s: {speeds['machine']}, batches of {speeds['batch_size']}, alternating." if speeds else ""
    text = f"""# {study.title}

Data: {study.data}.
Budget: {line["recipe"].get("epochs", 300)} epoch(s) of {line["images"]:,} images, {len(seeds)} of {study.seeds} seeds.
Machine: {machines}; {minutes:.1f} minutes a run (median), torch {line["torch"]}.{measured}

    python -m tools.study {study.path} --data-path DIR

Top-1 on {line["test_images"]:,} test images after the last epoch, mean ± standard deviation over the seeds. All cells
have the same data, budget, schedule and augmentation; those of a seed start from the same weights, except for their
mixers'. Cells whose means differ by less than {least:.2f}, twice the standard error of a difference, are called equal.

{table}

Best: {list(study.cells)[best]}; equal to it: {", ".join(equal) or "none"}.

![{study.title}]({study.name}.png)
"""
    atomic_write(folder / f"{study.name}.md", text)
    save_figure(folder / f"{study.name}.png", draw(study, means, spreads, speeds))


def draw(study: Study, means: list[float], spreads: list[float], speeds: dict[str, Any] | None) -> Figure:
    """Accuracy along the model argument that the study names, and against images/s in inference."""
    panels = {}
    if study.against:
        panels[study.against] = [arguments.get(study.against) for arguments in study.cells.values()]
    if speeds or not panels:
        rates = speeds["images_per_s"] if speeds else {}
        panels["images/s in inference"] = [rates.get(cell, {}).get("inference") for cell in study.cells]
    figure = Figure(figsize=(1.5 + 5.5 * len(panels), 4.5), layout="constrained")
    for axes, (name, places) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, (cell, place, mean, spread) in enumerate(zip(study.cells, places, means, spreads, strict=True)):
            style = {"color": f"C{number % 10}", "label": cell}
            if place is None:  # a cell without that argument
                axes.axhline(mean, linestyle="--", **style)
            else:
                axes.errorbar(place, mean, spread, fmt="osD^vP*"[number % 7], capsize=3, **style)
        axes.set_xlabel(name)
        axes.set_ylabel("Top-1 accuracy (%)")
        axes.grid(alpha=0.3)
    figure.suptitle(study.title, fontsize=11)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=8)
    return figure


if __name__ == "__main__":
    run_cli(main)
