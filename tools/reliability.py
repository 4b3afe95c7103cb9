"""Measure every promise of a run at its full count, and write the table of docs/reliability.md.

    python -m tools.reliability --output docs/reliability.md

Runs the tests in tests/reliability with RELIABILITY=full; each appends what it measured to a file, and the
table is made of that file alone. Exit code 1 if a figure is not reached; the table then says which.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.entry_point import run_cli
from tests.reliability.promises import PROMISES, Promise
from tools.command_line import ToolParser
from tools.machine import processor
from tools.mutate.report import section
from utils import atomic_write, make_directory

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "reliability"
PLANTED_FAULTS = ROOT / "docs" / "planted_faults.json"  # what `python -m tools.mutate` found
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")

Entry = dict[str, Any]


def run_tests(processes: int, record: Path) -> str:
    """Run the tests at the full count; pytest's last line."""
    environment = os.environ | {
        "RELIABILITY": "full",
        "RELIABILITY_RECORD": str(record),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", str(TESTS), "-n", str(processes), "--dist", "worksteal"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as running:
        last = ""
        for line in running.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return last.strip("= ")


def summarise(row: int, promise: Promise, entries: Sequence[Entry]) -> tuple[bool, str, str]:
    """(reached, the figures, how they were measured) of a row."""
    figures: dict[str, Entry] = {}
    for entry in entries:
        if "what" in entry:
            sums = figures.setdefault(entry["what"], {"measured": 0, "total": 0, "worst": None, "seconds": 0.0})
            for name in ("measured", "total", "seconds"):
                sums[name] += entry[name]
            if entry["worst"] is not None:
                sums["worst"] = max(entry["worst"], sums["worst"] or 0.0)
    failed = sorted({entry["test"].split("::")[-1] for entry in entries if "failed" in entry})
    tried = sum(sums["total"] for sums in figures.values())
    reached = (
        not failed and tried >= promise.total and all(sums["measured"] == sums["total"] for sums in figures.values())
    )
    shown = [
        f"{sums['measured']}/{sums['total']}" + (f" (largest {sums['worst']:.2g})" if sums["worst"] is not None else "")
        for sums in figures.values()
    ]
    if failed:
        shown.append("failed: " + ", ".join(failed))
    if tried < promise.total:
        shown.append(f"only {tried} of {promise.total} tried")
    files = sorted({Path(entry["test"].split("::")[0]).name for entry in entries})
    how = [
        *figures,
        f"{', '.join(files) or 'no test ran'}; {sum(s['seconds'] for s in figures.values()):.0f} s",
    ]
    return reached, "<br>".join(shown), "<br>".join(how)


def document(records: Sequence[Entry], command: str, seconds: float, ended: str) -> tuple[str, list[int]]:
    """The Markdown, and the rows whose figure is not reached."""
    missed, lines = [], []
    for row, promise in PROMISES.items():
        reached, figures, how = summarise(row, promise, [entry for entry in records if entry["row"] == row])
        if not reached:
            missed.append(row)
        cells = (
            row,
            promise.text,
            promise.figure,
            figures if reached else f"**not reached**: {figures}",
            how,
        )
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    verdict = (
        "Every figure is reached." if not missed else f"**Not reached: {', '.join(f'row {row}' for row in missed)}.**"
    )
    return "\n".join(
        [
            "# What a run promises, and what was measured",
            "",
            "Written by `python -m tools.reliability`; `make reliability` measures and writes it anew. Each figure "
            "of the table comes from a test in `tests/reliability`, which CI runs at a reduced count.",
            "",
            verdict,
            "",
            f"- Date: {time.strftime('%Y-%m-%d %H:%M %Z')}",
            f"- Machine: {processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
            f"- Versions: Python {platform.python_version()}, {versions}",
            f"- Command: `{command}` ({seconds / 60:.1f} minutes; {ended})",
            "",
            "| # | promise | figure to reach | figure reached | how measured |",
            "|---|---|---|---|---|",
            *lines,
            "",
            *section(json.loads(PLANTED_FAULTS.read_text(encoding="utf-8"))),
        ]
    ), missed


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("reliability", __doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "reliability.md", help="the table (default: docs/reliability.md)"
    )
    parser.add_argument("--processes", type=int, default=2, help="tests at a time")
    args = parser.parse_args(argv)
    make_directory(args.output.parent)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        record.touch()
        ended = run_tests(args.processes, record)
        records = [json.loads(line) for line in record.read_text().splitlines()]
    command = shlex.join([*parser.prog.split(), *(sys.argv[1:] if argv is None else argv)])
    text, missed = document(records, command, time.monotonic() - began, ended)
    atomic_write(args.output, text)
    if missed:
        sys.exit(f"{args.output}: not reached: rows {', '.join(map(str, missed))}")
    print(f"{args.output}: every figure is reached")


if __name__ == "__main__":
    run_cli(main)
