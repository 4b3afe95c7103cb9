"""What a detector finds and misses: AP by category and by size, precision-recall curves, the worst images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_masks
from matplotlib.figure import Figure

from detection.coco import CocoImages, decode_mask
from detection.coco_metrics import AREAS, NOTHING, Evaluated, Result
from detection.drawing import Drawn, draw_beside
from inference.output_files import save_figure, write_csv

WORST = 8  # images that are drawn
MATCH = 0.5  # IoU from which on a prediction has found an object
NAMED = 10  # categories with a precision-recall curve of their own
RECALLS = np.linspace(0, 1, 101)


def write_report(
    folder: Path, evaluated: dict[str, Evaluated], results: Sequence[Result], dataset: CocoImages, min_score: float
) -> None:
    """Write, for "box" and "mask", ``KIND_by_category.csv``, ``KIND_precision_recall.png``; and the worst images.

    Args:
        min_score: of predictions that count as made in the worst images.
    """
    for kind, found in evaluated.items():
        rows = category_rows(found, dataset.class_names)
        write_csv(folder / f"{kind}_by_category.csv", ["category", "AP", "AP50", "AP75", *AREAS[1:]], rows)
        save_figure(folder / f"{kind}_precision_recall.png", draw_precision_recall(found, dataset.class_names, kind))
    for rank, (index, missed, wrong) in enumerate(worst_images(results, dataset, min_score), 1):
        save_figure(
            folder / f"worst_{rank:02d}_{Path(dataset.path(index)).stem}.png",
            draw_image(dataset, index, _of_image(results, dataset, index, min_score), missed, wrong),
        )


def category_rows(found: Evaluated, names: Sequence[str]) -> list[list[Any]]:
    """Each category's AP over all thresholds, at 0.5 and 0.75, and by size, the worst first; "" where it has none."""
    precision = found.precision[..., -1]
    rows = []
    for number, name in enumerate(names):
        own = precision[:, :, number]
        values = [own[..., 0], own[0, :, 0], own[5, :, 0], *(own[..., area] for area in range(1, len(AREAS)))]
        rows.append([name, *(_per_cent(value) for value in values)])
    return sorted(rows, key=lambda row: (row[1] == "", float(row[1] or 0)))


def _per_cent(precision: np.ndarray) -> str:
    known = precision[precision > NOTHING]
    return f"{100 * known.mean():.2f}" if known.size else ""


def draw_precision_recall(found: Evaluated, names: Sequence[str], kind: str) -> Figure:
    """Precision over recall at IoU 0.5, 0.75 and the mean of COCO's thresholds, and of the worst categories."""
    precision = found.precision[:, :, :, 0, -1]
    shown = [i for i in range(len(names)) if (precision[:, :, i] > NOTHING).any()]
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="Recall", ylabel="Precision", xlim=(0, 1), ylim=(0, 1.02), title=f"{kind.capitalize()}, all sizes"
    )
    if shown:
        curves = {
            "IoU 0.5": precision[0][:, shown].mean(1),
            "IoU 0.75": precision[5][:, shown].mean(1),
            "mean of IoU 0.5 to 0.95": precision[:, :, shown].mean((0, 2)),
        }
        for name, curve in curves.items():
            axes.plot(RECALLS, curve, label=f"{name}: AP {100 * curve.mean():.1f}", linewidth=1.8)
        worst = sorted(shown, key=lambda i: precision[0, :, i].mean())[: NAMED if len(shown) > 1 else 0]
        for i in worst:
            axes.plot(RECALLS, precision[0, :, i], linewidth=0.7, alpha=0.7, label=f"{names[i]}, IoU 0.5")
        axes.legend(frameon=False, fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def worst_images(results: Sequence[Result], dataset: CocoImages, min_score: float) -> list[tuple[int, int, int]]:
    """(index, missed objects, wrong predictions) of the images with the most of both, the worst first."""
    by_image: dict[int, list[Result]] = {}
    for result in results:
        if result["score"] >= min_score:
            by_image.setdefault(result["image_id"], []).append(result)
    counted = []
    for index in range(len(dataset)):
        found = by_image.get(dataset.entry(index)["id"], [])
        counted.append((index, *count_mistakes(dataset.annotations(index), found)))
    worst = sorted(counted, key=lambda image: (-image[1] - image[2], image[0]))
    return [image for image in worst[:WORST] if image[1] + image[2]]


def count_mistakes(objects: Sequence[dict[str, Any]], results: Sequence[Result]) -> tuple[int, int]:
    """(missed objects, wrong predictions) of an image, by boxes; those in a crowd are neither."""
    crowd = np.array([entry["iscrowd"] for entry in objects], dtype=bool)
    missed, wrong = ~crowd, 0
    results = sorted(results, key=lambda result: -result["score"])
    boxes = [[entry["bbox"] for entry in entries] for entries in (results, objects)]
    overlaps = (
        coco_masks.iou(*boxes, crowd.astype(int).tolist())
        if objects and results
        else np.zeros((len(results), len(objects)))
    )
    for result, overlap in zip(results, overlaps, strict=True):
        same = [entry["category_id"] == result["category_id"] for entry in objects]
        matching = np.where(same, overlap, 0) >= MATCH
        if (matching & missed).any():
            missed[np.argmax(np.where(matching & missed, overlap, 0))] = False
        elif not (matching & crowd).any():
            wrong += 1
    return int(missed.sum()), wrong


def draw_image(dataset: CocoImages, index: int, results: Sequence[Result], missed: int, wrong: int) -> Figure:
    """An image's true objects beside its predictions."""
    annotations = [entry for entry in dataset.annotations(index) if not entry.get("iscrowd")]
    title = f"{Path(dataset.path(index)).name}: {missed} missed, {wrong} wrong"
    panels = {
        f"truth, {len(annotations)} objects": as_drawn(annotations, dataset, index),
        f"prediction, {len(results)} objects": as_drawn(results, dataset, index),
    }
    return draw_beside(dataset.image(index), panels, title)


def as_drawn(entries: Sequence[dict[str, Any]], dataset: CocoImages, index: int) -> Drawn:
    """Annotations or results of an image, as they are drawn."""
    image = dataset.entry(index)
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    boxes = np.array([entry["bbox"] for entry in entries], dtype=float).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = None
    if entries and all(entry.get("segmentation") for entry in entries):
        masks = np.stack([decode_mask(entry["segmentation"], image["height"], image["width"]) for entry in entries])
    scores = [entry["score"] for entry in entries] if entries and "score" in entries[0] else None
    return Drawn(boxes, [names[entry["category_id"]] for entry in entries], scores, masks)


def _of_image(results: Sequence[Result], dataset: CocoImages, index: int, min_score: float) -> list[Result]:
    number = dataset.entry(index)["id"]
    return [result for result in results if result["image_id"] == number and result["score"] >= min_score]
