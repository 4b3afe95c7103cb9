"""Train every cell of a table on equal terms, and say what came out.

    python -m tools.study STUDY.yaml --data-path DIR [training's flags]

STUDY is a file that names the cells and their one recipe; further flags of training go before the recipe's. Cells of a
seed share data, budget, schedule, augmentation and the weights they begin with, but for their mixers'. Runs go side by
side: one on each GPU, or one single-threaded on each core. A study that was stopped or killed goes on where it was.
Each run that has ended is a line of PAGE's folder's STUDY.jsonl: commit it, and the study goes on on another machine.
When all are there, the speed of the cells is measured, and PAGE gets a section with a table and plots.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.entry_point import run_cli
from runtime.run_directory import lock_directory
from tools.command_line import ToolParser
from training.arguments import POSITIVE, dashed
from training.console import duration
from utils import JobError, NonFiniteError, UserError, make_directory, say, tell

from .definition import Study, read_study
from .page import write_page
from .results import add_line, lines_of, result_of
from .speed import measure_speeds, read_speeds, write_speeds
from .workers import Job, devices, run_side_by_side


class RunFailed(JobError):
    """A run ended with an error; the study ends with the same code."""

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code if code > 0 else 128 - code


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("study", __doc__)
    add = parser.add_argument
    add("study", type=Path, metavar="STUDY.yaml", help="the table to fill; comes first")
    add("--page", type=Path, default=Path("docs/studies.md"), metavar="FILE", help="default: %(default)s")
    add("--runs", type=Path, default=Path("runs/studies"), metavar="DIR", help="run directories (default: %(default)s)")
    add("--workers", type=POSITIVE, metavar="N", help="runs side by side (default: one a GPU, or one a core)")
    add("--seeds", type=POSITIVE, metavar="N", help="runs of each cell (default: the file's)")
    add("--cells", nargs="+", metavar="NAME", help="train these alone")
    add("--speed", action="store_true", help="train nothing, but measure images/s anew; on a quiet machine")
    add("--page-only", action="store_true", help="train nothing: write the page of what there is")
    args, flags = parser.parse_known_args([dashed(word) for word in (sys.argv[1:] if argv is None else argv)])
    study = read_study(args.study, flags, args.seeds)
    for cell in args.cells or ():
        if cell not in study.cells:
            raise UserError(f"--cells {cell}: {args.study} has {', '.join(study.cells)}")
    folder = args.page.with_suffix("")
    results, speeds = folder / f"{study.name}.jsonl", folder / f"{study.name}_speed.json"
    lines = lines_of(study, results)
    if not args.speed and not args.page_only:
        done = {(line["cell"], line["seed"]) for line in lines}
        chosen = [cell for cell in study.cells if cell in (args.cells or study.cells)]
        jobs = [
            Job(cell, seed, args.runs / study.name / directory_name(study, cell, seed))
            for seed in range(study.seeds)
            for cell in chosen
            if (cell, seed) not in done
        ]
        train(study, jobs, results, args)
        lines = lines_of(study, results)
    if not lines:
        raise UserError(f"{results}: no results yet")
    complete = len(lines) == len(study.cells) * study.seeds
    if args.speed or (complete and not speeds.exists() and not args.page_only):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        write_speeds(speeds, measure_speeds(study, lines[0]["classes"], device))
    write_page(args.page, args.study, study, lines, read_speeds(speeds))
    say(f"{args.page}: {len(lines)} of {len(study.cells) * study.seeds} runs; results are in {results}")


def directory_name(study: Study, cell: str, seed: int) -> str:
    """Of a run; the digest keeps runs of different recipes apart."""
    digest = hashlib.sha256(json.dumps(study.recipe(cell), sort_keys=True).encode()).hexdigest()[:8]
    return f"{re.sub(r'[^a-z0-9]+', '-', cell.lower()).strip('-')}-seed{seed}-{digest}"


def train(study: Study, jobs: Sequence[Job], results: Path, args) -> None:
    """Run the jobs and note their results.

    Raises:
        RunFailed: one ended with an error. One whose loss was not finite lets the others go on.
    """
    if not jobs:
        return
    make_directory(args.runs / study.name)
    lock = lock_directory(args.runs / study.name)
    places = devices(args.workers)
    used: dict[Job, str] = {}

    def command(job: Job, place: str) -> list[str]:
        used[job] = place
        return study.command(job.cell, job.seed, job.directory.resolve(), place)

    say(f"{study.name}: {len(jobs)} runs, {len(places)} side by side on {', '.join(dict.fromkeys(places))}")
    began, failed = time.perf_counter(), []
    runs = run_side_by_side(jobs, places, command)
    try:
        for number, (job, code) in enumerate(runs, 1):
            if code:
                failed.append(RunFailed(f"{job.cell}, seed {job.seed}: {last_words(job)} (see {job.console})", code))
                if code != NonFiniteError.exit_code:
                    raise failed[-1]
                tell(f"error: {failed[-1]}")
                continue
            line = result_of(study, job.cell, job.seed, job.directory, used[job])
            add_line(results, line)
            left = (time.perf_counter() - began) / number * (len(jobs) - number)
            say(
                f"{job.cell}, seed {job.seed}: top-1 {line['acc1']:.2f} % ({number} of {len(jobs)}, "
                f"{duration(left)} to go)"
            )
    finally:
        runs.close()
        lock.release()
    if failed:
        raise failed[0]


def last_words(job: Job) -> str:
    """The last line that a run wrote."""
    said = job.console.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(said) if line.strip()), "it said nothing")


if __name__ == "__main__":
    run_cli(main)
