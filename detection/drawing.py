"""Pictures of objects in an image: masks, boxes, names, scores."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

PIXELS = 1200  # of a picture's longer side
GOLDEN = 0.6180339887  # of a turn around the colour circle: neighbours in any number of colours differ
CROWDED = 25  # objects above which labels are short
FONT = font_manager.findfont("DejaVu Sans")  # comes with matplotlib


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


def draw_objects(image: Image.Image, objects: Drawn) -> Image.Image:
    """The image, enlarged, with each object filled and outlined in its own colour and labelled."""
    scale = PIXELS / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    picture = pil_to_tensor(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    if not len(objects.boxes):
        return to_pil_image(picture)
    hues = [colorsys.hsv_to_rgb(i * GOLDEN % 1, 0.85, 1.0) for i in range(len(objects.boxes))]
    colours = [tuple(round(255 * part) for part in colour) for colour in hues]
    if objects.masks is not None:
        masks = torch.nn.functional.interpolate(torch.as_tensor(objects.masks)[None].float(), size[::-1])[0] > 0.5
        picture = draw_segmentation_masks(picture, masks, alpha=0.4, colors=colours)
    boxes = scale * torch.as_tensor(objects.boxes)
    crowded = len(boxes) > CROWDED
    labels = [label(objects, i, short=crowded) for i in range(len(boxes))]
    picture = draw_bounding_boxes(picture, boxes, labels, colours, width=3, font=FONT, font_size=14 if crowded else 22)
    return to_pil_image(picture)


def draw_beside(image: Image.Image, panels: dict[str, Drawn], title: str) -> Figure:
    """The image once for each of some sets of objects, side by side, each under its name."""
    scale = 6 / max(image.size)
    figure = Figure(figsize=(image.width * scale * len(panels), image.height * scale + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axes, (name, objects) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True):
        axes.imshow(draw_objects(image, objects))
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    return figure


def label(objects: Drawn, index: int, short: bool) -> str:
    """``cat 0.98``; in a crowd of one category ``98`` (per cent), and nothing for true objects."""
    score = None if objects.scores is None else objects.scores[index]
    if short and len(set(objects.names)) == 1:
        return "" if score is None else f"{100 * score:.0f}"
    return objects.names[index] if score is None else f"{objects.names[index]} {score:.2f}"
