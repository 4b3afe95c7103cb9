"""Data sets in COCO's format: images, and a JSON file of the objects in them, which is checked before it is used."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_masks
from PIL import Image

from detection.run_lengths import decode_counts
from inputs.images import BadImage, read_image
from utils import UserError, one_line, quote

NUCLEI = Path(__file__).parent / "nuclei"  # the embedded example
MOST_PIXELS = 2**28  # of an image, as its entry says
SLACK = 1.0  # pixels that a box may reach over the image's edge, for rounding


@dataclass(frozen=True)
class Objects:
    """What is annotated in an image.

    boxes: float32 (N, 4), corners (x1, y1, x2, y2) in pixels; labels: int64 (N,), from 1; masks: uint8 (N, H, W), of
    zeros and ones, None where they are not asked for.
    """

    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None


class CocoImages:
    """The images that a COCO file lists, with their objects.

    A category's label is its place, from 1, among the file's category ids in ascending order.

    Args:
        annotations: the JSON file.
        folder: that of its images.
        masks: whether every object has to have a mask.

    Raises:
        UserError: in one line, for a file that cannot be read and for the first entry that is wrong, with its id.

    Attributes:
        groups: uint8 (N,), 1 for an image that is wider than high.
        without_area: objects whose box has no area, which training leaves out.
    """

    def __init__(self, annotations: Path, folder: Path, masks: bool):
        self._file, self._folder, self._masks = annotations, folder, masks
        content = read_annotations(annotations)
        check = _Check(annotations, content)
        check.categories()
        check.images(folder)
        check.annotations(masks)
        categories = sorted(content["categories"], key=lambda category: category["id"])
        self.category_ids = tuple(category["id"] for category in categories)
        self.class_names = tuple(str(category["name"]) for category in categories)
        self._label_of = {category: label for label, category in enumerate(self.category_ids, 1)}
        # As bytes, which workers share: a million small objects would be copied to each as they are counted.
        self._images = [json.dumps(image).encode() for image in content["images"]]
        self._annotations = _grouped(content)
        self.groups = np.array([image["width"] > image["height"] for image in content["images"]], dtype=np.uint8)
        self.without_area = sum(min(found["bbox"][2:]) <= 0 for found in content["annotations"])
        self.objects = len(content["annotations"]) - self.without_area

    def __len__(self) -> int:
        return len(self._images)

    def entry(self, index: int) -> dict[str, Any]:
        """What the file says of an image: at least id, file_name, width, height."""
        return json.loads(self._images[index])

    def path(self, index: int) -> str:
        return str(self._folder / self.entry(index)["file_name"])

    def image(self, index: int) -> Image.Image:
        """The image as 8-bit RGB; raises `BadImage`, also if it is not of the size that the file says."""
        entry = self.entry(index)
        image = read_image(self.path(index))
        if image.size != (entry["width"], entry["height"]):
            raise BadImage(
                f"{self.path(index)}: {image.width}x{image.height} pixels, image {entry['id']} of {self._file} says "
                f"{entry['width']}x{entry['height']}"
            )
        return image

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """An image's entries of the file, as they are in it."""
        return json.loads(self._annotations[index])

    def load(self, index: int) -> tuple[Image.Image, Objects]:
        """An image and its objects to train on: no crowds, none without area; raises `BadImage`."""
        found = [
            annotation
            for annotation in self.annotations(index)
            if not annotation.get("iscrowd") and min(annotation["bbox"][2:]) > 0
        ]
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
                mask[:] = decode_mask(annotation["segmentation"], height, width)
        return image, Objects(boxes, labels, masks)

    def ground_truth(self) -> dict[str, Any]:
        """The content of the file that evaluation needs."""
        return {
            "images": [json.loads(image) for image in self._images],
            "annotations": [entry for own in self._annotations for entry in json.loads(own)],
            "categories": [
                {"id": number, "name": name} for number, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }


def open_split(data_path: str | os.PathLike, train: bool, masks: bool) -> CocoImages:
    """One split in COCO's layout: ``annotations/instances_train*.json`` and the folder ``train*`` it is called after.

    Raises:
        UserError: there is not exactly one such file; see `CocoImages`.
    """
    root, split = Path(data_path), "train" if train else "val"
    if not root.is_dir():
        raise UserError(f"--data-path {root}: no such folder")
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if len(found) != 1:
        named = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"--data-path {root}: annotations/instances_{split}*.json is one file in COCO's layout, not {named}"
        )
    folder = root / found[0].stem.removeprefix("instances_")
    if not folder.is_dir():
        raise UserError(f"--data-path {root}: {found[0].name} is of the images in {folder.name}/, which is not there")
    return CocoImages(found[0], folder, masks)


def read_annotations(path: Path) -> dict[str, Any]:
    """The content of a COCO file; raises UserError unless it is JSON with images, annotations, categories."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON, cut short perhaps: {one_line(error)}") from error
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: no list of {key} in it, so it is not in COCO's format")
    return content


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Polygons or run lengths that were checked, as uint8 (height, width) of zeros and ones."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return coco_masks.decode(segmentation)
    encoded = coco_masks.frPyObjects(segmentation, height, width)
    return coco_masks.decode(coco_masks.merge(encoded) if isinstance(encoded, list) else encoded)


def _grouped(content: Mapping[str, Any]) -> list[bytes]:
    """The annotations of each image as JSON."""
    by_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        by_image[annotation["image_id"]].append(annotation)
    return [json.dumps(own).encode() for own in by_image.values()]


class _Check:
    """Raises UserError, naming file and id, for the first entry of a COCO file that is wrong."""

    def __init__(self, path: Path, content: dict[str, Any]):
        self._path, self._content = path, content
        self._sizes: dict[int, tuple[int, int]] = {}  # (height, width) by the image's id
        self._categories: set[int] = set()

    def categories(self) -> None:
        for category in self._content["categories"]:
            number = self._id("category", category, self._categories)
            self._categories.add(number)
            if "name" not in category:
                raise self._wrong(f"category {number}", "it has no name")
        if not self._categories:
            raise UserError(f"{self._path}: it has no categories")

    def images(self, folder: Path) -> None:
        present: dict[str, set[str]] = {}  # the files of each folder of images
        for image in self._content["images"]:
            number = self._id("image", image, self._sizes)
            what = f"image {number}"
            height, width = image.get("height"), image.get("width")
            if not all(isinstance(side, int) and 0 < side < MOST_PIXELS for side in (height, width)):
                raise self._wrong(what, f"its height and width are {quote(height)} and {quote(width)}")
            if height * width > MOST_PIXELS:
                raise self._wrong(what, f"{width}x{height} pixels are more than an image has")
            name = image.get("file_name")
            if (
                not isinstance(name, str)
                or "\0" in name
                or PurePosixPath(name).is_absolute()
                or ".." in name.split("/")
            ):
                raise self._wrong(what, f"its file_name is {quote(name)}, no file below {folder}")
            parent, file = os.path.split(folder / name)
            if parent not in present:
                present[parent] = set(os.listdir(parent)) if os.path.isdir(parent) else set()
            if file not in present[parent]:
                raise self._wrong(what, f"its file {quote(str(folder / name))} is missing")
            self._sizes[number] = (height, width)
        if not self._sizes:
            raise UserError(f"{self._path}: it has no images")

    def annotations(self, masks: bool) -> None:
        seen: set[int] = set()
        for annotation in self._content["annotations"]:
            number = self._id("annotation", annotation, seen)
            seen.add(number)
            what, image = f"annotation {number}", annotation.get("image_id")
            if not _is_id(image) or image not in self._sizes:
                raise self._wrong(what, f"of image {quote(image)}, which is not among the images")
            category = annotation.get("category_id")
            if not _is_id(category) or category not in self._categories:
                raise self._wrong(what, f"of category {quote(category)}, which is not among the categories")
            if annotation.get("iscrowd", 0) not in (0, 1):
                raise self._wrong(what, f"its iscrowd is {quote(annotation['iscrowd'])}, not 0 or 1")
            self._box(what, annotation.get("bbox"), *self._sizes[image])
            if not _is_amount(annotation.get("area")):
                raise self._wrong(what, f"its area is {quote(annotation.get('area'))}")
            if "segmentation" in annotation:
                self._segmentation(what, annotation["segmentation"], *self._sizes[image])
            elif masks:
                raise self._wrong(what, "it has no segmentation, and masks are to be learned")

    def _box(self, what: str, box: Any, height: int, width: int) -> None:
        if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
            raise self._wrong(what, f"its bbox is {str(box)[:60]}, not x, y, width, height")
        x, y, w, h = box
        if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK or x >= width or y >= height:
            raise self._wrong(what, f"its box {box} reaches out of the image, {width}x{height} pixels")

    def _segmentation(self, what: str, segmentation: Any, height: int, width: int) -> None:
        if isinstance(segmentation, dict):
            if segmentation.get("size") != [height, width]:
                size = str(segmentation.get("size"))[:40]
                raise self._wrong(what, f"its mask is of size {size}, the image [{height}, {width}] (height, width)")
            try:
                counts = decode_counts(segmentation.get("counts"))
            except ValueError as error:
                raise self._wrong(what, f"its mask cannot be read: {error}") from error
            if sum(counts) != height * width:
                raise self._wrong(what, f"its mask is of {sum(counts)} pixels, the image of {height * width}")
        elif isinstance(segmentation, list) and segmentation:
            for polygon in segmentation:
                self._polygon(what, polygon)
        else:
            raise self._wrong(what, f"its segmentation is {str(segmentation)[:40]}, neither polygons nor run lengths")

    def _polygon(self, what: str, polygon: Any) -> None:
        if not isinstance(polygon, list) or len(polygon) < 6:
            points = len(polygon) // 2 if isinstance(polygon, list) else "no"
            raise self._wrong(what, f"a polygon of {points} points; it takes three")
        if len(polygon) % 2:
            raise self._wrong(what, f"a polygon of {len(polygon)} numbers; x and y make an even count")
        if not all(map(_is_number, polygon)):
            raise self._wrong(what, "a polygon of other things than numbers")

    def _id(self, kind: str, entry: Mapping[str, Any], seen: Sequence[int] | set[int] | dict) -> int:
        number = entry.get("id")
        if not _is_id(number):
            raise self._wrong(f"one {kind}", f"its id is {quote(number)}, not an integer")
        if number in seen:
            raise self._wrong(f"{kind} {number}", "its id is there twice")
        return number

    def _wrong(self, what: str, why: str) -> UserError:
        return UserError(f"{self._path}: {what}: {why}")


def _is_id(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e9


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0
