"""Draw the objects in an image: masks, boxes, names and scores."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

PIXELS = 1200  # longer side of the drawing
GOLDEN = 0.6180339887  # hue step (golden ratio), which gives consecutive objects different colours
CROWDED = 25  # above this number of objects, labels only show the score
FONT = font_manager.findfont("DejaVu Sans")  # comes with matplotlib


def draw_objects(
    image: Image.Image,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: np.ndarray | None = None,
) -> Image.Image:
    """Enlarge an image and draw each object, filled, outlined and labelled, in its own colour.

    Args:
        boxes: (N, 4), corners in pixels.
        names: N category names.
        scores: N scores; None for the ground truth.
        masks: (N, H, W), or None.
    """
    scale = PIXELS / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    picture = pil_to_tensor(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    if not len(boxes):
        return to_pil_image(picture)
    hues = [colorsys.hsv_to_rgb(i * GOLDEN % 1, 0.85, 1.0) for i in range(len(boxes))]
    colours = [tuple(round(255 * part) for part in colour) for colour in hues]
    if masks is not None:
        enlarged = torch.nn.functional.interpolate(torch.as_tensor(masks)[None].float(), size[::-1])[0] > 0.5
        picture = draw_segmentation_masks(picture, enlarged, alpha=0.4, colors=colours)
    numbers = [""] * len(boxes) if scores is None else [f"{score:.2f}" for score in scores]
    crowded = len(boxes) > CROWDED
    labels = numbers if crowded else [f"{name} {score}" for name, score in zip(names, numbers, strict=True)]
    boxes = scale * torch.as_tensor(boxes)
    picture = draw_bounding_boxes(picture, boxes, labels, colours, width=3, font=FONT, font_size=14 if crowded else 22)
    return to_pil_image(picture)
