"""Pictures of objects in an image: masks, boxes, names, scores."""

import colorsys
from collections.abc import Sequence

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

PIXELS = 1200  # of a picture's longer side
GOLDEN = 0.6180339887  # of a turn around the colour circle: neighbours in any number of colours differ
CROWDED = 25  # objects above which a label is only the score
FONT = font_manager.findfont("DejaVu Sans")  # comes with matplotlib


def draw_objects(
    image: Image.Image,
    boxes: np.ndarray,
    names: Sequence[str],
    scores: Sequence[float] | None = None,
    masks: np.ndarray | None = None,
) -> Image.Image:
    """The image, enlarged, with each object filled and outlined in its own colour and labelled.

    Args:
        boxes: (N, 4), corners in pixels.
        names: of their categories.
        scores: (N,); None for true objects.
        masks: (N, H, W), if there are any.
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
