"""A small data set in COCO's layout with the peculiarities of real ones, made from the embedded cells.

It has images of several shapes, polygons, run lengths, crowds, gaps in the category ids, a category without objects and
an image without objects.
"""

import json

import contourpy
import numpy as np
from pycocotools import mask as coco_masks

from detection.coco import NUCLEI, open_split

CATEGORIES = [{"id": 3, "name": "small cell"}, {"id": 7, "name": "large cell"}, {"id": 90, "name": "mitosis"}]
LARGE = 150  # pixels
SHAPES = ((256, 256), (160, 256), (256, 144))  # height, width


def write_example(root, train=8, val=4, scale=1):
    """Write the data set to `root`; `scale` divides the sides of its images."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        folder = root / f"{split}2017"
        folder.mkdir()
        cells = open_split(NUCLEI, split, masks=True)
        content = {"images": [], "annotations": [], "categories": CATEGORIES}
        for i in range(count):
            image, objects = cells.load(i)
            height, width = (side // scale for side in SHAPES[i % 3])
            image = image.resize((256 // scale, 256 // scale)).crop((0, 0, width, height))
            image.save(folder / f"{i:012d}.png")
            number = 100 - 7 * i  # ids in no order
            content["images"].append({"id": number, "file_name": f"{i:012d}.png", "height": height, "width": width})
            masks = [mask[::scale, ::scale][:height, :width] for mask in objects["masks"].numpy()]
            masks = [] if i == 3 else [mask for mask in masks if mask.sum() > 3]
            content["annotations"] += annotations(masks, number, len(content["annotations"]) + 1, scale)
        (root / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    return root


def annotations(masks, image_id, first_id, scale):
    """Annotate an image's masks: the last two as a crowd, the others alternately as polygons and run lengths."""
    crowd = [np.maximum(masks[-1], masks[-2])] if len(masks) > 4 else []
    single = masks[:-2] if crowd else masks
    found = []
    for i, mask in enumerate([*single, *crowd]):
        encoded = coco_masks.encode(np.asfortranarray(mask))
        area = int(mask.sum())
        compressed = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
        segmentation = polygons(mask) if i % 2 == 0 and polygons(mask) else compressed
        is_crowd = i >= len(single)
        found.append(
            {
                "id": first_id + i,
                "image_id": image_id,
                "category_id": 7 if area * scale**2 > LARGE else 3,
                "bbox": [float(value) for value in coco_masks.toBbox(encoded)],
                "area": area,
                "iscrowd": int(is_crowd),
                "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)} if is_crowd else segmentation,
            }
        )
    return found


def polygons(mask):
    lines = contourpy.contour_generator(z=np.pad(mask, 1)).lines(0.5)
    return [(line[:-1] - 0.5).ravel().tolist() for line in lines if len(line) > 4]


def run_lengths(mask):
    """COCO's uncompressed run lengths, column by column, starting with zeros."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return counts if flat[0] == 0 else [0, *counts]
