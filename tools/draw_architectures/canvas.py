"""Boxes, arrows, words and little pictures on a sheet whose unit is a pixel of the README."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

PIXELS_AN_INCH = 100
INK, FAINT = "#2b303a", "#737b88"
LINE = "#9aa1ac"


def shades(colour: str) -> LinearSegmentedColormap:
    """White to a colour, for pictures of one."""
    return LinearSegmentedColormap.from_list(colour, ["#ffffff", colour])


SLATE = shades("#3a4252")


class Canvas:
    """A white sheet; the origin is its lower left corner."""

    def __init__(self, width: int, height: int):
        self.figure = Figure(figsize=(width / PIXELS_AN_INCH, height / PIXELS_AN_INCH))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def words(self, x: float, y: float, text: str, size: float = 8, colour: str = INK, **style: object) -> None:
        """Text around (x, y), or with `ha` and `va` beside it."""
        defaults = {"ha": "center", "va": "center", "linespacing": 1.25}
        self.axes.text(x, y, text, fontsize=size, color=colour, **defaults | style)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        colour: str,
        text: str = "",
        ink: str = INK,
        size: float = 7.5,
    ) -> None:
        """A filled box with its lower left corner at (x, y)."""
        style = f"round,pad=0,rounding_size={min(4, width / 4)}"
        self.axes.add_patch(FancyBboxPatch((x, y), width, height, style, facecolor=colour, edgecolor="none"))
        if text:
            self.words(x + width / 2, y + height / 2, text, size, ink)

    def arrow(self, *points: tuple[float, float]) -> None:
        """Straight lines from point to point with a head at the last."""
        for begin, end in zip(points, points[1:], strict=False):
            head = "-|>" if end == points[-1] else "-"
            self.axes.add_patch(
                FancyArrowPatch(begin, end, arrowstyle=head, mutation_scale=8, shrinkA=0, shrinkB=0, color=LINE, lw=1.1)
            )

    def picture(
        self, x: float, y: float, width: float, height: float, values: np.ndarray, colours: LinearSegmentedColormap
    ) -> None:
        """Numbers (rows, columns) as shades, the largest the darkest, in a thin frame."""
        scale = {"vmin": 0, "vmax": float(np.quantile(values, 0.995)) or 1.0}
        extent = (x, x + width, y, y + height)
        self.axes.imshow(values, cmap=colours, extent=extent, interpolation="nearest", aspect="auto", zorder=2, **scale)
        self.axes.add_patch(Rectangle((x, y), width, height, fill=False, edgecolor=LINE, lw=0.7, zorder=3))

    def chips(
        self, x: float, y: float, colours: Sequence[str], width: float, height: float, gap: float
    ) -> list[tuple[float, float]]:
        """A box for each colour, side by side; where each begins and ends."""
        places = [x + i * (width + gap) for i in range(len(colours))]
        for place, colour in zip(places, colours, strict=True):
            self.box(place, y, width, height, colour)
        return [(place, place + width) for place in places]
