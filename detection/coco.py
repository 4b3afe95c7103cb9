"""Data sets in COCO's format: images, and a JSON file of the objects in them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as coco_masks
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors

from inputs.images import BadImage, read_image
from utils import UserError, one_line

NUCLEI = Path(__file__).parent / "nuclei"  # the embedded example


class CocoImages:
    """The images listed in a COCO file, with their objects.

    Labels number the file's categories from 1, in ascending order of their ids. Objects whose box has no area are
    skipped.

    Args:
        annotations: the JSON file.
        folder: the folder of its images.
        masks: whether the detector needs masks; otherwise, segmentations are ignored.

    Raises:
        UserError: if the file is not in COCO's format, or an annotation refers to a missing image or category.

    Attributes:
        groups: uint8 (N,), 1 for an image that is wider than high.
        objects: number of objects to train on, without crowds.
        without_area: number of skipped objects.
    """

    def __init__(self, annotations: Path, folder: Path, masks: bool):
        self.file, self._folder, self._masks = annotations, folder, masks
        try:
            content = json.loads(annotations.read_bytes())
            self._index(content["images"], content["annotations"], content["categories"])
        except (OSError, ValueError, KeyError, TypeError) as error:  # KeyError: an entry lacks a field
            raise UserError(f"{annotations}: not a complete file in COCO's format: {error!r}") from error

    def _index(self, images: list[dict], annotations: list[dict], categories: list[dict]) -> None:
        self._categories = sorted(categories, key=lambda category: category["id"])
        self.category_ids = tuple(category["id"] for category in self._categories)
        self.class_names = tuple(str(category["name"]) for category in self._categories)
        self._label_of = {category: label for label, category in enumerate(self.category_ids, 1)}
        by_image: dict[int, list[dict]] = {image["id"]: [] for image in images}
        if not images or not categories:
            raise ValueError("no images or no categories")
        for entry in annotations:
            if entry["image_id"] not in by_image or entry["category_id"] not in self._label_of:
                raise UserError(f"{self.file}: annotation {entry['id']} refers to a missing image or category")
            _, _, width, height = entry["bbox"]
            if min(width, height) > 0:
                entry |= {"iscrowd": entry.get("iscrowd", 0), "area": entry.get("area", width * height)}
                if not self._masks:
                    entry.pop("segmentation", None)
                by_image[entry["image_id"]].append(entry)
        kept = [entry for own in by_image.values() for entry in own]
        if self._masks and (without := [entry["id"] for entry in kept if not entry.get("segmentation")]):
            raise UserError(
                f"{self.file}: {len(without)} of {len(kept)} objects have no segmentation (the first is annotation "
                f"{without[0]}), which Mask R-CNN needs; for boxes only, use --detector faster_rcnn or retinanet"
            )
        # Bytes stay in memory that workers share. Reference counting would copy dicts to each worker.
        self._images = [json.dumps(image).encode() for image in images]
        self._annotations = [json.dumps(own).encode() for own in by_image.values()]
        self.groups = np.array([image["width"] > image["height"] for image in images], dtype=np.uint8)
        self.objects = sum(not entry["iscrowd"] for entry in kept)
        self.without_area = len(annotations) - len(kept)

    def __len__(self) -> int:
        return len(self._images)

    def entry(self, index: int) -> dict[str, Any]:
        """Return an image's entry in the file, which has at least id, file_name, width and height."""
        return json.loads(self._images[index])

    def path(self, index: int) -> str:
        return str(self._folder / self.entry(index)["file_name"])

    def image(self, index: int) -> Image.Image:
        """Read an image as 8-bit RGB; raise `BadImage` if it is unreadable or its size differs from its entry.

        The image is rotated by its EXIF orientation, as in annotation tools, unless its entry has the size of the
        unrotated image.
        """
        entry, path = self.entry(index), self.path(index)
        size = (entry["width"], entry["height"])
        for upright in (True, False):
            image = read_image(path, upright=upright)
            if image.size == size:
                return image
        raise BadImage(
            f"{path}: {image.width}x{image.height} pixels (with and without its EXIF orientation), but image "
            f"{entry['id']} of {self.file} has {size[0]}x{size[1]}"
        )

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Return the file's entries for an image's objects and crowds."""
        return json.loads(self._annotations[index])

    def load(self, index: int) -> tuple[Image.Image, dict[str, Tensor]]:
        """Load an image and its objects for training, without crowds; raise `BadImage` if that fails.

        "boxes" are float32 (N, 4), corners (x1, y1, x2, y2) in pixels; "labels" int64 (N,), from 1; "masks", if the
        detector needs them, uint8 (N, H, W) of zeros and ones.
        """
        found = [annotation for annotation in self.annotations(index) if not annotation["iscrowd"]]
        image = self.image(index)
        height, width = image.height, image.width
        boxes = np.array([annotation["bbox"] for annotation in found], dtype=np.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        boxes = boxes.clip(0, np.array([width, height, width, height], dtype=np.float32))
        labels = [self._label_of[annotation["category_id"]] for annotation in found]
        objects = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor(labels, dtype=torch.int64),
        }
        if self._masks:
            try:
                masks = [decode_mask(annotation["segmentation"], height, width) for annotation in found]
            except Exception as error:  # the decoder raises many types of errors
                raise BadImage(f"{self.path(index)}: a mask in {self.file}: {one_line(error)}") from error
            stacked = np.array(masks, dtype=np.uint8).reshape(-1, height, width)
            objects["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return image, objects

    def ground_truth(self) -> dict[str, Any]:
        """Return the file's content for evaluation."""
        return {
            "images": [json.loads(image) for image in self._images],
            "annotations": [entry for own in self._annotations for entry in json.loads(own)],
            "categories": self._categories,
        }


def open_split(data_path: str | os.PathLike, split: str, masks: bool) -> CocoImages:
    """Open a split, "train", "val" or "test", in COCO's or Roboflow's layout.

    COCO's layout is ``annotations/instances_train*.json`` with images in the folder ``train*`` of the same name.
    Roboflow's is ``train/_annotations.coco.json`` with images in the same folder; "val" is ``valid``.

    Raises:
        UserError: if there is no such file, or more than one; see also `CocoImages`.
    """
    root = Path(data_path)
    roboflow = root / ("valid" if split == "val" else split) / "_annotations.coco.json"
    if roboflow.is_file():
        return CocoImages(roboflow, roboflow.parent, masks)
    found = sorted((root / "annotations").glob(f"instances_{split}*.json"))
    if len(found) != 1:
        raise UserError(
            f"--data-path {root}: expected one file annotations/instances_{split}*.json (COCO's layout) or "
            f"{roboflow.relative_to(root)} (Roboflow's), found {', '.join(path.name for path in found) or 'none'}"
        )
    return CocoImages(found[0], root / found[0].stem.removeprefix("instances_"), masks)


def decode_mask(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Decode polygons or run lengths to uint8 (height, width) of zeros and ones; ValueError for another size."""
    mask = coco_masks.decode(coco_masks.segmToRle(segmentation, width, height))
    if mask.shape != (height, width):
        raise ValueError(f"its size is {mask.shape[1]}x{mask.shape[0]}, not {width}x{height}")
    return mask
