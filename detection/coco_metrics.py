"""COCO's evaluation of boxes and masks with faster-coco-eval."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_masks
from torch import Tensor
from torchvision.ops import box_convert

KINDS = {"box": "bbox", "mask": "segm"}
AREAS = ("all", "small", "medium", "large")
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
NOTHING = -1.0  # COCO's value where the ground truth has no objects
Result = dict[str, Any]


def to_results(prediction: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[Result]:
    """Convert an image's predictions, boxes in pixels and masks as probabilities, to COCO's result format."""
    boxes = box_convert(prediction["boxes"].double(), "xyxy", "xywh").tolist()
    labels, scores = prediction["labels"].tolist(), prediction["scores"].double().tolist()
    results: list[Result] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(boxes, labels, scores, strict=True)
    ]
    if "masks" in prediction:
        masks = (prediction["masks"][:, 0] > 0.5).byte().cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            encoded = coco_masks.encode(np.asfortranarray(mask))
            result["segmentation"] = {"size": list(mask.shape), "counts": encoded["counts"].decode()}
    return results


def results_of(results: Sequence[Result], kind: str) -> list[Result]:
    """Keep only the "box" or "mask" results; with both, COCO's tools would use the box's area for the mask."""
    dropped = "segmentation" if kind == "box" else "bbox"
    return [{name: value for name, value in result.items() if name != dropped} for result in results]


def evaluate_results(
    ground_truth: dict[str, Any], results: Sequence[Result], kind: str, detections: int
) -> COCOeval_faster:
    """Evaluate "box" or "mask" results against the content of an annotation file.

    The result's ``eval["precision"]`` has the axes (IoU thresholds 0.5 to 0.95, 101 recalls from 0 to 1, categories,
    `AREAS`, maximum numbers of detections); it is `NOTHING` where there are no such objects.

    Args:
        detections: maximum number of detections per image; COCO uses 100.
    """
    truth = COCO(ground_truth, use_deepcopy=True)
    evaluation = COCOeval_faster(truth, truth.loadRes(results_of(results, kind)), KINDS[kind])
    evaluation.params.maxDets = [1, 10, max(detections, 11)]
    evaluation.run()
    return evaluation


def numbers(evaluation: COCOeval_faster) -> dict[str, float]:
    """Return COCO's twelve metrics in per cent, without those of object sizes that do not occur."""
    values = zip(NUMBERS, evaluation.stats.tolist(), strict=True)
    return {name: 100 * value for name, value in values if value != NOTHING}
