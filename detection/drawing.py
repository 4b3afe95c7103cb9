"""Pictures of objects in an image: masks, boxes, names, scores."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

INCHES = 6.0  # of a picture's longer side
GOLDEN = 0.6180339887  # of a turn around the colour circle: neighbours in any number of colours differ
CROWDED = 25  # objects from which on only their outlines are told apart


@dataclass(frozen=True)
class Drawn:
    """Objects of an image.

    boxes: (N, 4), corners in pixels; names: of their categories; scores: (N,), None for true objects; masks: (N, H, W),
    None where there are none.
    """

    boxes: np.ndarray
    names: Sequence[str]
    scores: Sequence[float] | None = None
    masks: np.ndarray | None = None


def draw_picture(image: Image.Image, objects: Drawn) -> Figure:
    """The image alone with the objects over it."""
    figure = Figure(figsize=_size(image))
    draw_objects(figure.add_axes((0, 0, 1, 1)), image, objects)
    return figure


def draw_beside(image: Image.Image, panels: dict[str, Drawn], title: str) -> Figure:
    """The image once for each of some sets of objects, side by side, each under its name."""
    width, height = _size(image)
    figure = Figure(figsize=(width * len(panels), height + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (name, objects) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        draw_objects(axes, image, objects)
        axes.set_title(name, fontsize=9)
    return figure


def _size(image: Image.Image) -> tuple[float, float]:
    scale = INCHES / max(image.size)
    return image.width * scale, image.height * scale


def draw_objects(axes: Axes, image: Image.Image, objects: Drawn) -> None:
    """Fill and outline every object in a colour of its own; name it and tell its score where there is room."""
    pixels = np.asarray(image.convert("RGB")) / 255
    colours = [colorsys.hsv_to_rgb(i * GOLDEN % 1, 0.85, 1.0) for i in range(len(objects.boxes))]
    if objects.masks is not None:
        for mask, colour in zip(objects.masks, colours, strict=True):
            pixels[mask > 0] = 0.6 * pixels[mask > 0] + 0.4 * np.array(colour)
    axes.imshow(pixels, interpolation="lanczos")
    crowded = len(objects.boxes) > CROWDED
    for i, (box, colour) in enumerate(zip(objects.boxes, colours, strict=True)):
        if objects.masks is not None and objects.masks[i].any():
            axes.contour(objects.masks[i], levels=[0.5], colors=[colour], linewidths=0.9)
        x1, y1, x2, y2 = box
        thin = 0.4 if objects.masks is not None else 1.0
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=thin))
        text = _label(objects, i, short=crowded)
        if text:
            axes.text(
                x1,
                y1,
                text,
                fontsize=3.5 if crowded else 6,
                color="white",
                verticalalignment="bottom",
                bbox={"facecolor": "black", "alpha": 0.55, "edgecolor": "none", "pad": 0.6},
                clip_on=True,
            )
    axes.set(xlim=(-0.5, image.width - 0.5), ylim=(image.height - 0.5, -0.5))
    axes.set_axis_off()


def _label(objects: Drawn, index: int, short: bool) -> str:
    """``cat 0.98``; in a crowd of one category ``98`` (per cent), and nothing for true objects."""
    score = None if objects.scores is None else objects.scores[index]
    if short and len(set(objects.names)) == 1:
        return "" if score is None else f"{100 * score:.0f}"
    return objects.names[index] if score is None else f"{objects.names[index]} {score:.2f}"
