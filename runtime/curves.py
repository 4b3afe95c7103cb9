"""Plots of a run: columns of its log over the epochs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from runtime.run_directory import Plot

EMA = "_ema"  # suffix of the columns of the averaged weights


def draw_curves(
    rows: Sequence[Mapping[str, Any]], plot: Plot, best_epoch: int | None = None, title: str = ""
) -> Figure:
    """Draw `plot` from the rows of a log, with a title and the best epoch marked."""
    figure = Figure(figsize=(7, 1.1 + 3.4 * len(plot)), dpi=120, layout="constrained")
    panels = figure.subplots(len(plot), sharex=True, squeeze=False)[:, 0]
    marker = "." if len(rows) <= 30 else None
    for axes, (label, columns) in zip(panels, plot.items(), strict=True):
        for number, (column, name) in enumerate(columns.items()):
            for key, legend, style in ((column, name, "-"), (column + EMA, f"{name}, EMA", "--")):
                points = [(row["epoch"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
                if points:
                    axes.plot(*zip(*points, strict=True), style, color=f"C{number}", marker=marker, label=legend)
        if best_epoch is not None:
            axes.axvline(best_epoch, color="0.5", linestyle=":", label=f"best: epoch {best_epoch}")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
        axes.set_ylabel(label)
    axes.set_xlabel("Epoch")
    figure.align_ylabels()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    figure.suptitle(title, fontsize=10, parse_math=False)
    return figure
