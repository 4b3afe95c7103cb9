"""Figures as files."""

from pathlib import Path

from matplotlib.figure import Figure

from utils import atomic_write, printable


def as_label(text: str, longest: int = 24) -> str:
    """`text` as it is to be read in a figure: in one line, cut, no part of it taken for mathematics."""
    text = printable(text)
    return (text if len(text) <= longest else f"{text[: longest - 1]}…").replace("$", r"\$")


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure in the format of the file's extension."""
    options = {"format": path.suffix[1:], "dpi": 200, "bbox_inches": "tight", "pad_inches": 0.05}
    atomic_write(path, lambda file: figure.savefig(file, **options))
