"""The files that infer.py writes: JSON, tables, figures; and whether they can be written, before the work begins."""

import csv
import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils import UserError, atomic_write, make_directory, printable


def check_output(path: Path, suffixes: Sequence[str] = (".json",), flag: str = "--output") -> None:
    """Raise UserError if a file cannot be written in the end: for its suffix, its folder, or pyarrow's absence."""
    if path.suffix not in suffixes:
        raise UserError(f"{flag} {path}: name it {' or '.join(suffixes)}, which says the format")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{flag} {path}: Parquet files need pip install pyarrow")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: there is no folder {path.parent} that can be written to")


def check_results(output: Path | None, report: Path | None) -> None:
    """Make sure that an evaluation's results can be written in the end, and make the folder of its report."""
    if output is not None:
        check_output(output)
    if report is not None:
        make_directory(report)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Values that JSON does not know are written as text."""
    atomic_write(path, json.dumps(content, indent=2, default=str) + "\n")


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows((header, *rows))
    atomic_write(path, text.getvalue())


def write_parquet(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from pyarrow import parquet, table  # optional

    columns = {name: [row[i] for row in rows] for i, name in enumerate(header)}
    atomic_write(path, lambda file: parquet.write_table(table(columns), file))


def as_label(text: str, longest: int = 24) -> str:
    """`text` for a figure: in one line, cut, and never interpreted as mathematics."""
    text = printable(text)
    return (text if len(text) <= longest else f"{text[: longest - 1]}…").replace("$", r"\$")


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure in the format of the file's suffix."""
    options = {"format": path.suffix[1:], "dpi": 200, "bbox_inches": "tight", "pad_inches": 0.05}
    atomic_write(path, lambda file: figure.savefig(file, **options))
