"""Write the output files of infer.py (JSON, tables, figures), and check early that they can be written."""

import csv
import importlib.util
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from utils import UserError, atomic_write


def check_output(path: Path | None, suffixes: Sequence[str] = (".json",), flag: str = "--output") -> None:
    """Raise UserError if a file has an unknown suffix or no writable folder, or needs pyarrow, which is missing."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise UserError(f"{flag} {path}: the file name must end in {' or '.join(suffixes)}")
    if path.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(f"{flag} {path}: Parquet files need pyarrow; run pip install pyarrow")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{flag} {path}: the folder {path.parent} does not exist or is not writable")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file; values that JSON does not support are written as strings."""
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
    """Convert text to a figure label: one line, truncated, and not interpreted as mathematics."""
    text = " ".join(text.split())
    return (text if len(text) <= longest else f"{text[: longest - 1]}…").replace("$", r"\$")


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure in the format of the file's suffix."""
    options = {"format": path.suffix[1:], "dpi": 200, "bbox_inches": "tight", "pad_inches": 0.05}
    atomic_write(path, lambda file: figure.savefig(file, **options))
