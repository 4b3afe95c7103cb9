"""What the runs of a study say together: means, their spread, and which cells can be told apart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .results import Line


@dataclass(frozen=True)
class Summary:
    """The runs of a cell: their accuracies in per cent by seed, and one of its lines for what they have in common."""

    cell: str
    by_seed: Mapping[int, float]
    line: Line

    @property
    def accuracies(self) -> tuple[float, ...]:
        return tuple(self.by_seed.values())

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
    return [
        Summary(cell, {line["seed"]: line["acc1"] for line in found}, found[0]) for cell, found in runs.items() if found
    ]


def residual_deviation(summaries: Sequence[Summary]) -> float:
    """The standard deviation of what neither its cell nor its seed explains of a run's accuracy.

    The runs of a seed share their data and what they begin with, which moves all cells alike and says nothing of their
    differences. Taken from the seeds that every cell has; nan of fewer than two cells or seeds.
    """
    seeds = set.intersection(*(set(summary.by_seed) for summary in summaries))
    freedom = (len(summaries) - 1) * (len(seeds) - 1)
    if freedom <= 0:
        return math.nan
    of_cells = [statistics.fmean(summary.by_seed[seed] for seed in seeds) for summary in summaries]
    of_seeds = {seed: statistics.fmean(summary.by_seed[seed] for summary in summaries) for seed in seeds}
    of_all = statistics.fmean(of_cells)
    squares = sum(
        (summary.by_seed[seed] - of_cell - of_seeds[seed] + of_all) ** 2
        for summary, of_cell in zip(summaries, of_cells, strict=True)
        for seed in seeds
    )
    return math.sqrt(squares / freedom)


def compare(one: Summary, other: Summary, deviation: float) -> tuple[float, float]:
    """(difference of the means over the seeds of both, how large it may be by chance); nan where they share no seed.

    By chance is twice the standard error of the difference.
    """
    shared = one.by_seed.keys() & other.by_seed.keys()
    if not shared:
        return math.nan, math.nan
    difference = statistics.fmean(one.by_seed[seed] - other.by_seed[seed] for seed in shared)
    return difference, 2 * deviation * math.sqrt(2 / len(shared))


def equal(one: Summary, other: Summary, deviation: float) -> bool:
    """Whether two cells differ, seed by seed, by no more than by chance. Nothing is told apart by nan."""
    difference, chance = compare(one, other, deviation)
    return not abs(difference) >= chance
