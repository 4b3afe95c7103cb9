"""The page of studies: a section for each, written anew from its results; what stands around it is left alone."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path

from inference.output_files import save_figure
from utils import atomic_write, make_directory

from .definition import Study
from .plots import draw_against, draw_speeds
from .results import Line
from .speed import Speeds
from .summary import Summary, compare, equal, residual_deviation, summarise

EPOCHS = 300  # of a recipe that does not say
BEGIN, END = "<!-- {}: written by python -m tools.study -->", "<!-- {}: end -->"


def write_page(page: Path, path: Path, study: Study, lines: Sequence[Line], speeds: Speeds | None) -> None:
    """Draw the pictures of the study in `path` and write its section of the page, at its end if it has none yet."""
    folder = page.with_suffix("")
    make_directory(folder)
    summaries = summarise(list(study.cells), lines)
    pictures = {}
    if study.against is not None:
        pictures[study.against] = draw_against(study, summaries)
    if speeds is not None:
        pictures["speed"] = draw_speeds(study, summaries, speeds)
    files = {}
    for name, figure in pictures.items():
        files[name] = folder / f"{study.name}_{name}.png"
        save_figure(files[name], figure)
    text = section(path, study, lines, summaries, speeds, {n: f"{folder.name}/{f.name}" for n, f in files.items()})
    begin, end = BEGIN.format(study.name), END.format(study.name)
    whole = page.read_text(encoding="utf-8") if page.exists() else ""
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    text = f"{begin}\n{text}\n{end}"
    whole = pattern.sub(lambda _: text, whole) if pattern.search(whole) else f"{whole}\n{text}\n".lstrip()
    atomic_write(page, whole)


def section(
    path: Path,
    study: Study,
    lines: Sequence[Line],
    summaries: Sequence[Summary],
    speeds: Speeds | None,
    pictures: dict[str, str],
) -> str:
    """Heading with budget, data and machine; table; verdict; pictures."""
    deviation = residual_deviation(summaries)
    parts = [f"## {study.title}", _heading(path, study, lines), table(summaries, deviation, speeds)]
    parts.append(verdict(summaries, deviation))
    if speeds is not None:
        parts.append(f"Images/s: {speeds['machine']}, batches of {speeds['batch_size']}, medians, cells by turns.")
    parts += [f"![{study.title}: accuracy against {name}]({file})" for name, file in pictures.items()]
    return "\n\n".join(parts)


def _heading(path: Path, study: Study, lines: Sequence[Line]) -> str:
    line = lines[0]
    machines = sorted({line["machine"] for line in lines})
    recipe = line["recipe"]
    minutes = statistics.median(line["seconds"] for line in lines) / 60
    planned = len(study.cells) * study.seeds
    state = "" if len(lines) == planned else f" **Not finished: {len(lines)} of {planned} runs.**"
    epochs = f"{epochs} epochs" if (epochs := recipe.get("epochs", EPOCHS)) > 1 else "one epoch"
    return (
        f"Data: {study.data}. Budget: {epochs} of {line['images']:,} images, {study.seeds} seeds a cell. Machine: "
        f"{', '.join(machines)}; {minutes:.1f} minutes of training a run (median), torch {line['torch']}.{state}\n\n"
        f"    python -m tools.study {path} --data-path DIR\n\n"
        f"Top-1 on {line['test_images']:,} test images after the last epoch. All cells have the same data, budget, "
        "schedule and augmentation, and those of a seed begin with the same weights but for their mixers'."
    )


def table(summaries: Sequence[Summary], deviation: float, speeds: Speeds | None) -> str:
    best = max(summaries, key=lambda summary: summary.mean)
    head = ["cell", "top-1 %, mean ± deviation", "to the best", "parameters", "GFLOPs"]
    head += ["images/s, training", "inference"] if speeds else []
    rows = [head, ["---"] * len(head)]
    for summary in summaries:
        shown = "" if math.isnan(summary.deviation) else f" ± {summary.deviation:.2f}"
        apart = "best" if summary is best else f"{compare(summary, best, deviation)[0]:.2f}"
        if summary is not best and equal(summary, best, deviation):
            apart = "equal"
        row = [summary.cell, f"{summary.mean:.2f}{shown}", apart]
        row += [f"{summary.line['parameters']:,}", f"{summary.line['gflops']:.4f}"]
        if speeds:
            rates = speeds["images_per_s"][summary.cell]
            row += [f"{rates['training']:.0f}", f"{rates['inference']:.0f}"]
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def verdict(summaries: Sequence[Summary], deviation: float) -> str:
    """Which cells can be told from the best one, in words."""
    best = max(summaries, key=lambda summary: summary.mean)
    if math.isnan(deviation):
        return "One run a cell: there is no spread, and no two cells can be told apart."
    others = [summary for summary in summaries if summary is not best]
    alike = [summary.cell for summary in others if equal(summary, best, deviation)]
    least = min((compare(best, summary, deviation)[1] for summary in others), default=0.0)
    return (
        f"Neither its cell nor its seed explains {deviation:.2f} points of a run's accuracy (the standard deviation), "
        f"so that cells closer than {least:.2f}, twice the standard error of their difference over the same seeds, are "
        f"called equal. Best: {best.cell}; "
        f"equal to it: {', '.join(alike) or 'none'}."
    )
