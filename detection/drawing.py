"""Draw the objects in an image: masks, boxes, names and scores."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib import font_manager
from PIL import Image
from torchvision.ops import box_convert
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from detection.coco import decode_mask

PIXELS = 1200  # longer side of the drawing
GOLDEN = 0.6180339887  # hue step (golden ratio), which gives consecutive objects different colours
CROWDED = 25  # above this number of objects, labels only show the score
FONT = font_manager.findfont("DejaVu Sans")  # comes with matplotlib


def draw_objects(image: Image.Image, objects: Sequence[dict[str, Any]], names: Mapping[int, str]) -> Image.Image:
    """Enlarge an image and draw each object, filled, outlined and labelled, in its own colour.

    Args:
        objects: annotations, or results with scores, in COCO's format.
        names: category names by category id.
    """
    scale = PIXELS / max(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    picture = pil_to_tensor(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    if not objects:
        return to_pil_image(picture)
    hues = [colorsys.hsv_to_rgb(i * GOLDEN % 1, 0.85, 1.0) for i in range(len(objects))]
    colours = [tuple(round(255 * part) for part in colour) for colour in hues]
    if "segmentation" in objects[0]:
        masks = np.stack([decode_mask(entry["segmentation"], image.height, image.width) for entry in objects])
        enlarged = torch.nn.functional.interpolate(torch.from_numpy(masks)[None].float(), size[::-1])[0] > 0.5
        picture = draw_segmentation_masks(picture, enlarged, alpha=0.4, colors=colours)
    crowded = len(objects) > CROWDED
    scores = [f"{entry['score']:.2f}" if "score" in entry else "" for entry in objects]
    named = [f"{names[entry['category_id']]} {score}" for entry, score in zip(objects, scores, strict=True)]
    boxes = scale * box_convert(torch.tensor([entry["bbox"] for entry in objects]), "xywh", "xyxy")
    labels, font_size = (scores, 14) if crowded else (named, 22)
    return to_pil_image(draw_bounding_boxes(picture, boxes, labels, colours, width=3, font=FONT, font_size=font_size))
