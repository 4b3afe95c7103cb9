"""What came of the planted faults: figures to keep and to go on from, and a section of docs/reliability.md."""

from __future__ import annotations

import ast
import hashlib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .faults import Fault

REQUIRED = 0.95  # of the faults that a test could notice

Outcome = dict[str, str]


def share(figures: Mapping[str, Any]) -> float:
    """Of the faults that a test could notice, those that one did."""
    return figures["caught"] / max(figures["caught"] + figures["survived"], 1)


def outcome(fault: Fault, caught_by: str, root: Path) -> Outcome:
    """What a fault was caught by, "" for nothing, and the state of the code that says so."""
    return {"caught by": caught_by, "state": _state(fault, caught_by, root)}


def _state(fault: Fault, caught_by: str, root: Path) -> str:
    """A digest of the fault's module and of the test's function."""
    text = (root / fault.module).read_text()
    file, _, test = caught_by.partition("::")
    if test:
        name = test.partition("[")[0]
        functions = ast.parse((root / file).read_text()).body
        text += "".join(ast.unparse(function) for function in functions if getattr(function, "name", "") == name)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def holds(fault: Fault, found: Outcome | None, root: Path) -> bool:
    """Whether module and test are as they were when that was found."""
    return found is not None and found["state"] == _state(fault, found["caught by"], root)


def as_figures(
    outcomes: Mapping[Fault, Outcome], equivalent: Mapping[str, str], tests: Mapping[str, Sequence[str]], seed: int
) -> dict[str, Any]:
    """The figures of all and of each module, and what became of each fault.

    Args:
        equivalent: why a fault, by its name, cannot be noticed.
        tests: the files of tests that name a module's behaviour.
    """
    ends = {
        fault: "caught" if found["caught by"] else "equivalent" if fault.name in equivalent else "survived"
        for fault, found in outcomes.items()
    }
    counts = Counter((fault.module, end) for fault, end in ends.items())
    columns = ("caught", "equivalent", "survived")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "planted": len(ends),
        **{column: list(ends.values()).count(column) for column in columns},
        "modules": {
            module: {"tests": list(tests[module]), **{column: counts[module, column] for column in columns}}
            for module in dict.fromkeys(fault.module for fault in ends)
        },
        "not caught": {fault.name: equivalent.get(fault.name, "") for fault, end in ends.items() if end != "caught"},
        "faults": {fault.name: outcomes[fault] for fault in sorted(outcomes, key=lambda fault: fault.name)},
    }


def section(figures: Mapping[str, Any]) -> list[str]:
    """Markdown lines on what `as_figures` made."""
    noticeable = figures["caught"] + figures["survived"]
    lines = [
        "## Planted faults",
        "",
        f"`python -m tools.mutate` planted {figures['planted']} faults (seed {figures['seed']}, {figures['date']}), "
        "one at a time: a comparison flipped, a constant one larger, a condition negated, two arguments exchanged, "
        "a call left out. Each was tried by the tests that name the module's behaviour, and by no others. "
        f"**{figures['caught']} of the {noticeable} that a test could notice were caught, "
        f"{100 * share(figures):.1f} %** (to reach: {100 * REQUIRED:g} %); "
        f"{figures['equivalent']} change nothing that anybody could notice.",
        "",
        "| module | caught | survived | equivalent | tests |",
        "|---|---|---|---|---|",
    ]
    for module, counts in figures["modules"].items():
        named = ", ".join(f"test_{name}.py" for name in counts["tests"])
        lines.append(f"| {module} | {counts['caught']} | {counts['survived']} | {counts['equivalent']} | {named} |")
    if figures["not caught"]:
        lines += ["", "Not caught:", ""]
        for fault, reason in figures["not caught"].items():
            lines.append(f"- `{fault.replace('`', '')}`: {reason or '**survived**'}")
    return [*lines, ""]
