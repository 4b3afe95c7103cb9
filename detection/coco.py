"""Data sets in COCO's format: images, and a JSON file of the objects in them."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_masks
from PIL import Image

from inputs.images import BadImage, read_image
from utils import UserError, one_line

NUCLEI = Path(__file__).parent / "nuclei"  # the embedded example
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}
ROBOFLOW = "_annotations.coco.json"
REQUIRED = {
    "images": ("id", "file_name", "height", "width"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
    "categories": ("id", "name"),
}


@dataclass(frozen=True)
class Objects:
    """What is annotated in an image.

    boxes: float32 (N, 4), corners (x1, y1, x2, y2) in pixels; labels: int64 (N,), from 1; masks: uint8 (N, H, W), of
    zeros and ones, None for a detector of boxes alone.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


class CocoImages:
    """The images that a COCO file lists, with their objects.

    A category's label is its position, from 1, among the file's category ids in ascending order. Objects whose box has
    no area are left out.

    Args:
        annotations: the JSON file.
        folder: that of its images.
        masks: whether the detector needs masks; without it, segmentations are not looked at.

    Raises:
        UserError: the file cannot be read or used; the message gives the id of the first wrong entry.

    Attributes:
        groups: uint8 (N,), 1 for an image that is wider than high.
        objects: how many are trained on; crowds are not.
        without_area: how many were left out.
    """

    def __init__(self, annotations: Path, folder: Path, masks: bool):
        self.file, self._folder, self._masks = annotations, folder, masks
        content = read_annotations(annotations)
        check_entries(annotations, content, folder)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = tuple(category["id"] for category in categories)
        self.class_names = tuple(str(category["name"]) for category in categories)
        self._label_of = {category: label for label, category in enumerate(self.category_ids, 1)}
        kept = [entry for entry in content["annotations"] if min(entry["bbox"][2:]) > 0]
        for entry in kept:
            width, height = entry["bbox"][2:]
            entry |= {"iscrowd": entry.get("iscrowd", 0), "area": entry.get("area", width * height)}
        if masks:
            check_masks(annotations, kept)
        else:
            kept = [{key: value for key, value in entry.items() if key != "segmentation"} for entry in kept]
        by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
        for entry in kept:
            by_image[entry["image_id"]].append(entry)
        # As bytes, which workers share: Python objects would be copied to each worker as their references are counted.
        self._images = [json.dumps(image).encode() for image in content["images"]]
        self._annotations = [json.dumps(own).encode() for own in by_image.values()]
        self.groups = np.array([image["width"] > image["height"] for image in content["images"]], dtype=np.uint8)
        self.objects = sum(not entry["iscrowd"] for entry in kept)
        self.without_area = len(content["annotations"]) - len(kept)

    def __len__(self) -> int:
        return len(self._images)

    def entry(self, index: int) -> dict[str, Any]:
        """An image's entry in the file: at least id, file_name, width, height."""
        return json.loads(self._images[index])

    def path(self, index: int) -> str:
        return str(self._folder / self.entry(index)["file_name"])

    def image(self, index: int) -> Image.Image:
        """The image as 8-bit RGB; raises `BadImage`, also for an image that is not as large as its entry says.

        It is turned as its EXIF orientation says, like annotation tools show it, unless its entry gives the size of
        the image as it is stored.
        """
        entry, path = self.entry(index), self.path(index)
        size = (entry["width"], entry["height"])
        image = read_image(path, upright=True)
        if image.size != size:
            image = read_image(path)
        if image.size != size:
            raise BadImage(
                f"{path}: {image.width}x{image.height} pixels (with and without its EXIF orientation), but image "
                f"{entry['id']} of {self.file} has {size[0]}x{size[1]}"
            )
        return image

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """An image's objects and crowds, as entries of the file."""
        return json.loads(self._annotations[index])

    def load(self, index: int) -> tuple[Image.Image, Objects]:
        """An image and its objects to train on, without crowds; raises `BadImage`."""
        found = [annotation for annotation in self.annotations(index) if not annotation["iscrowd"]]
        image = self.image(index)
        height, width = image.height, image.width
        boxes = np.array([annotation["bbox"] for annotation in found], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
        labels = np.array([self._label_of[annotation["category_id"]] for annotation in found], dtype=np.int64)
        masks = None
        if self._masks:
            masks = np.zeros((len(found), height, width), dtype=np.uint8)
            for mask, annotation in zip(masks, found, strict=True):
                try:
                    mask[:] = decode_mask(annotation["segmentation"], height, width)
                except Exception as error:  # the decoder raises whatever it stumbles over
                    raise BadImage(
                        f"{self.path(index)}: the mask of annotation {annotation['id']} of {self.file} cannot be "
                        f"decoded for {width}x{height} pixels: {one_line(error)}"
                    ) from error
        return image, Objects(boxes, labels, masks)

    def ground_truth(self) -> dict[str, Any]:
        """The file's content as evaluation needs it."""
        return {
            "images": [json.loads(image) for image in self._images],
            "annotations": [entry for own in self._annotations for entry in json.loads(own)],
            "categories": [
                {"id": number, "name": name} for number, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }


def open_split(data_path: str | os.PathLike, split: str, masks: bool) -> CocoImages:
    """One split, "train", "val" or "test", in COCO's or Roboflow's layout.

    COCO's: ``annotations/instances_train*.json`` and the folder ``train*`` that it is named after. Roboflow's:
    ``train/_annotations.coco.json`` with the images beside it; its ``valid`` is val.

    Raises:
        UserError: there is no such file, or more than one; see `CocoImages`.
    """
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    for name in SPLIT_NAMES[split]:
        if (root / name / ROBOFLOW).is_file():
            return CocoImages(root / name / ROBOFLOW, root / name, masks)
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if len(found) != 1:
        raise UserError(
            f"--data-path {root}: it needs one file annotations/instances_{split}*.json (COCO's layout) or "
            f"{SPLIT_NAMES[split][-1]}/{ROBOFLOW} (Roboflow's), not {', '.join(path.name for path in found) or 'none'}"
        )
    folder = root / found[0].stem.removeprefix("instances_")
    if not folder.is_dir():
        raise UserError(f"--data-path {root}: the images of {found[0].name} belong in {folder.name}/, which is missing")
    return CocoImages(found[0], folder, masks)


def read_annotations(path: Path) -> dict[str, Any]:
    """The content of a COCO file; raises UserError unless it is JSON with images, annotations and categories."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON; is it complete? {one_line(error)}") from error
    for key in REQUIRED:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"{path}: it has no list of {key}, so it is not in COCO's format")
    return content


def check_entries(path: Path, content: dict[str, list[dict]], folder: Path) -> None:
    """Raise UserError for keys or image files that are missing, repeated ids and ids that refer to nothing."""
    for kind, keys in REQUIRED.items():
        for entry in content[kind]:
            if missing := [key for key in keys if key not in entry]:
                raise UserError(f"{path}: {kind[:-1]} {entry.get('id')} of {kind} has no {missing[0]}")
        number, count = next(iter(Counter(entry["id"] for entry in content[kind]).most_common(1)), (None, 0))
        if count > 1:
            raise UserError(f"{path}: {count} of its {kind} have the id {number}")
    if not content["images"] or not content["categories"]:
        raise UserError(f"{path}: it has no {'categories' if content['images'] else 'images'}")
    parents = {os.path.dirname(image["file_name"]) for image in content["images"]}
    parents = [parent for parent in parents if (folder / parent).is_dir()]
    present = {os.path.join(parent, name) for parent in parents for name in os.listdir(folder / parent)}
    for image in content["images"]:
        if image["file_name"] not in present:
            raise UserError(f"{path}: the file of image {image['id']}, {folder / image['file_name']}, is missing")
    for key, kind in (("image_id", "images"), ("category_id", "categories")):
        known = {entry["id"] for entry in content[kind]}
        for entry in content["annotations"]:
            if entry[key] not in known:
                raise UserError(f"{path}: annotation {entry['id']}: its {key} {entry[key]} is not among the {kind}")
    for entry in content["annotations"]:
        box = entry["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and np.isfinite(np.array(box, dtype=float)).all()):
            raise UserError(f"{path}: annotation {entry['id']}: its bbox is {box}, not [x, y, width, height]")


def check_masks(path: Path, entries: Sequence[dict[str, Any]]) -> None:
    """Raise UserError for an object without a mask."""
    without = [entry["id"] for entry in entries if not entry.get("segmentation")]
    if without:
        raise UserError(
            f"{path}: {len(without)} of {len(entries)} objects have no segmentation (the first is annotation "
            f"{without[0]}), which Mask R-CNN learns; for boxes alone use --detector faster_rcnn or retinanet"
        )


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons or run lengths as uint8 (height, width) of zeros and ones; raises ValueError for another size."""
    if isinstance(segmentation, list):
        if min(map(len, segmentation)) < 6:  # four numbers would be taken for a box
            raise ValueError("a polygon of fewer than three points")
        encoded = coco_masks.merge(coco_masks.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        encoded = coco_masks.frPyObjects(segmentation, *segmentation["size"])
    else:
        encoded = segmentation
    mask = coco_masks.decode(encoded)
    if mask.shape != (height, width):
        raise ValueError(f"its size is {mask.shape[1]}x{mask.shape[0]}")
    return mask
