"""What the runs of a study say together: means, their spread, and which cells can be told apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .results import Line


@dataclass(frozen=True)
class Summary:
    """The runs of a cell: their accuracies in per cent, and one of its lines for what they have in common."""

    cell: str
    accuracies: tuple[float, ...]
    line: Line

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """The standard deviation of its runs; nan for one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else math.nan


def summarise(cells: Sequence[str], lines: Sequence[Line]) -> list[Summary]:
    """A summary of each cell that has runs."""
    runs: Mapping[str, list[Line]] = {cell: [line for line in lines if line["cell"] == cell] for cell in cells}
    return [Summary(cell, tuple(line["acc1"] for line in found), found[0]) for cell, found in runs.items() if found]


def pooled_deviation(summaries: Sequence[Summary]) -> float:
    """The standard deviation of a run within its cell, from all cells; nan if none has two runs."""
    freedom = sum(len(summary.accuracies) - 1 for summary in summaries)
    if freedom == 0:
        return math.nan
    squares = sum((accuracy - summary.mean) ** 2 for summary in summaries for accuracy in summary.accuracies)
    return math.sqrt(squares / freedom)


def spread(one: Summary, other: Summary, deviation: float) -> float:
    """How far the means of two cells are apart by chance: twice the standard error of their difference."""
    return 2 * deviation * math.sqrt(1 / len(one.accuracies) + 1 / len(other.accuracies))


def equal(one: Summary, other: Summary, deviation: float) -> bool:
    """Whether two cells differ by less than the spread. Without one (nan) nothing is told apart."""
    return not abs(one.mean - other.mean) >= spread(one, other, deviation)
