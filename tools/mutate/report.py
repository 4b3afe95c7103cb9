"""What came of the planted faults: as JSON, and as a section of docs/reliability.md."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from .faults import Fault

REQUIRED = 0.95  # of the faults that a test could notice

Result = tuple[Fault, str, str]  # a fault, what caught it or "", why nothing could or ""


def share(caught: int, survived: int) -> float:
    return caught / max(caught + survived, 1)


def as_json(results: Sequence[Result], seed: int) -> str:
    """The figures of each module, and the faults that nothing caught."""
    modules: dict[str, dict[str, int]] = {}
    for fault, caught, reason in results:
        counts = modules.setdefault(fault.module, {"caught": 0, "equivalent": 0, "survived": 0})
        counts["caught" if caught else "equivalent" if reason else "survived"] += 1
    figures = {
        "date": time.strftime("%Y-%m-%d"),
        "seed": seed,
        "planted": len(results),
        **{name: sum(counts[name] for counts in modules.values()) for name in ("caught", "equivalent", "survived")},
        "modules": modules,
        "not caught": {fault.name: reason for fault, caught, reason in results if not caught},
        "caught by": {fault.name: caught for fault, caught, _ in results if caught},
    }
    return json.dumps(figures, indent=1, ensure_ascii=False) + "\n"


def section(figures: Mapping[str, Any], tests: Mapping[str, Sequence[str]]) -> list[str]:
    """Markdown lines on the figures that `as_json` wrote."""
    caught, survived = figures["caught"], figures["survived"]
    lines = [
        "## Planted faults",
        "",
        f"`python -m tools.mutate` planted {figures['planted']} faults (seed {figures['seed']}, {figures['date']}), "
        "one at a time: a comparison flipped, a constant one larger, a condition negated, two arguments exchanged, "
        "a call left out. Each was tried by the tests that name the module's behaviour, and by no others. "
        f"**{caught} of the {caught + survived} that a test could notice were caught, "
        f"{100 * share(caught, survived):.1f} %** (to reach: {100 * REQUIRED:g} %); "
        f"{figures['equivalent']} change nothing that anybody could notice.",
        "",
        "| module | caught | survived | equivalent | tests |",
        "|---|---|---|---|---|",
    ]
    for module, counts in figures["modules"].items():
        named = ", ".join(f"test_{name}.py" for name in tests.get(module, ()))
        lines.append(f"| {module} | {counts['caught']} | {counts['survived']} | {counts['equivalent']} | {named} |")
    if figures["not caught"]:
        lines += ["", "Not caught:", ""]
        for fault, reason in figures["not caught"].items():
            lines.append(f"- `{fault.replace('`', '')}`: {reason or '**survived**'}")
    return [*lines, ""]
