"""The pictures of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from .definition import Study
from .speed import Speeds
from .summary import Summary

ACCURACY = "Top-1 accuracy (%)"
COLORS, MARKERS = [f"C{number}" for number in range(10)], "osD^vP*"  # of 10 and of 7: no cell has another's of both
WIDE = 2  # times the slowest: from there on speeds are drawn on a logarithmic axis


def draw_against(study: Study, summaries: Sequence[Summary]) -> Figure:
    """Accuracy along the argument that `study.against` names; cells without it are lines across."""
    figure, axes = _axes(study.title)
    along = {summary.cell: study.cells[summary.cell].get(study.against) for summary in summaries}
    points = sorted((along[summary.cell], summary) for summary in summaries if _is_number(along[summary.cell]))
    if points:
        places, found = zip(*points, strict=True)
        axes.errorbar(
            places, [s.mean for s in found], [_bar(s) for s in found], fmt="o-", capsize=3, label="mean, deviation"
        )
        for place, summary in points:
            axes.plot([place] * len(summary.accuracies), summary.accuracies, ".", color="0.6", zorder=1)
        axes.plot([], [], ".", color="0.6", label="runs")
    others = [summary for summary in summaries if not _is_number(along[summary.cell])]
    for number, summary in enumerate(others, 1):
        axes.axhline(summary.mean, color=f"C{number}", linestyle="--", label=summary.cell)
        axes.axhspan(summary.mean - _bar(summary), summary.mean + _bar(summary), color=f"C{number}", alpha=0.12)
    axes.set_xlabel(study.against)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False)
    return figure


def draw_speeds(study: Study, summaries: Sequence[Summary], speeds: Speeds) -> Figure:
    """Accuracy against images/s in inference."""
    figure, axes = _axes(study.title)
    rates: Mapping[str, Mapping[str, float]] = speeds["images_per_s"]
    best_first = sorted(summaries, key=lambda summary: summary.mean, reverse=True)
    for summary, color, marker in zip(best_first, cycle(COLORS), cycle(MARKERS), strict=False):
        rate = rates[summary.cell]["inference"]
        style = {"fmt": marker, "capsize": 3, "color": color, "label": summary.cell}
        axes.errorbar(rate, summary.mean, _bar(summary), **style)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    found = [rates[summary.cell]["inference"] for summary in summaries]
    if max(found) > WIDE * min(found):
        axes.set_xscale("log")
        for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            formatter(ScalarFormatter())
    axes.set_xlabel(f"Images/s in inference ({speeds['machine']})")
    return figure


def _axes(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize=11)
    axes.set_ylabel(ACCURACY)
    axes.grid(alpha=0.3)
    return figure, axes


def _bar(summary: Summary) -> float:
    return 0.0 if math.isnan(summary.deviation) else summary.deviation


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
