"""COCO's evaluation of boxes and masks, by faster-coco-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask as coco_masks
from torch import Tensor

KINDS = {"box": "bbox", "mask": "segm"}
AREAS = ("all", "small", "medium", "large")
FEWEST = (1, 10)  # detections an image, of AR1 and AR10
NOTHING = -1.0  # where there is no object to be found
Result = dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """The result of COCO's evaluation of boxes or masks; `NOTHING` where there are no such objects.

    precision: (IoU thresholds 0.5 to 0.95, recalls 0 to 1 in 101 steps, categories, `AREAS`, most detections);
    recall: the same without the second axis.
    """

    precision: np.ndarray
    recall: np.ndarray

    def numbers(self) -> dict[str, float]:
        """COCO's twelve numbers in per cent, without those of sizes that no object has."""
        precision, recall = self.precision[..., -1], self.recall[..., -1]
        found = {
            "AP": _mean(precision[..., 0]),
            "AP50": _mean(precision[0, ..., 0]),
            "AP75": _mean(precision[5, ..., 0]),
            **{f"AP{area[0]}": _mean(precision[..., i]) for i, area in enumerate(AREAS) if i},
            "AR1": _mean(self.recall[..., 0, 0]),
            "AR10": _mean(self.recall[..., 0, 1]),
            "AR": _mean(recall[..., 0]),
            **{f"AR{area[0]}": _mean(recall[..., i]) for i, area in enumerate(AREAS) if i},
        }
        return {name: 100 * value for name, value in found.items() if value != NOTHING}


def _mean(values: np.ndarray) -> float:
    known = values[values > NOTHING]
    return float(known.mean()) if known.size else NOTHING


def to_results(prediction: Mapping[str, Tensor], image_id: int, category_ids: Sequence[int]) -> list[Result]:
    """One image's predictions, boxes in its pixels and masks as probabilities, in COCO's result format."""
    boxes = prediction["boxes"].double().cpu()
    boxes[:, 2:] -= boxes[:, :2]
    results: list[Result] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in zip(
            boxes.tolist(), prediction["labels"].tolist(), prediction["scores"].double().tolist(), strict=True
        )
    ]
    if "masks" in prediction:
        masks = (prediction["masks"][:, 0] > 0.5).to(torch.uint8).cpu().numpy()
        for result, mask in zip(results, masks, strict=True):
            encoded = coco_masks.encode(np.asfortranarray(mask))
            result["segmentation"] = {"size": list(encoded["size"]), "counts": _text(encoded["counts"])}
    return results


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def results_of(results: Sequence[Result], kind: str) -> list[Result]:
    """Results of "box" or "mask" alone: with both, COCO's tools would use the box's area for the mask."""
    dropped = "segmentation" if kind == "box" else "bbox"
    return [{name: value for name, value in result.items() if name != dropped} for result in results]


def evaluate_results(ground_truth: dict[str, Any], results: Sequence[Result], kind: str, detections: int) -> Evaluated:
    """COCO's evaluation of "box" or "mask" results against the content of an annotation file.

    Args:
        detections: how many of the best per image count; COCO uses 100.
    """
    truth = COCO(ground_truth, use_deepcopy=True)
    evaluation = COCOeval_faster(truth, _loaded(truth, results_of(results, kind)), KINDS[kind])
    evaluation.params.maxDets = [*FEWEST, max(detections, FEWEST[-1] + 1)]
    evaluation.evaluate()
    evaluation.accumulate()
    return Evaluated(np.asarray(evaluation.eval["precision"]), np.asarray(evaluation.eval["recall"]))


def _loaded(truth: COCO, results: list[Result]) -> COCO:
    if results:
        return truth.loadRes(results)
    return COCO({"images": truth.dataset["images"], "categories": truth.dataset["categories"], "annotations": []})
