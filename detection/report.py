"""Report on a detector: AP by category and by size, precision-recall curves, and the worst images."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from matplotlib.figure import Figure

from detection.coco import CocoImages
from detection.coco_metrics import AREAS, NOTHING, Result, results_of
from detection.drawing import draw_objects
from inference.output_files import save_figure, write_csv

WORST = 8  # number of images to draw
MATCH = 0.5  # minimum IoU for a prediction to match an object
RECALLS = np.linspace(0, 1, 101)


def write_report(
    folder: Path,
    evaluated: dict[str, COCOeval_faster],
    results: Sequence[Result],
    dataset: CocoImages,
    min_score: float,
) -> None:
    """Write ``KIND_by_category.csv`` and ``KIND_precision_recall.png`` for "box" and "mask", and the worst images.

    Args:
        min_score: minimum score of the predictions used to find and draw the worst images.
    """
    for kind, found in evaluated.items():
        precision = np.asarray(found.eval["precision"])[..., -1]  # (IoU thresholds, recalls, categories, areas)
        rows = category_rows(precision, dataset.class_names)
        write_csv(folder / f"{kind}_by_category.csv", ["category", "AP", "AP50", "AP75", *AREAS[1:]], rows)
        save_figure(folder / f"{kind}_precision_recall.png", draw_precision_recall(precision[..., 0], kind))
    shown = [result for result in results if result["score"] >= min_score]
    missed, wrong = count_mistakes(dataset.ground_truth(), shown)
    index_of = {dataset.entry(index)["id"]: index for index in range(len(dataset))}
    for rank, (image, _) in enumerate((missed + wrong).most_common(WORST), 1):
        found = [result for result in shown if result["image_id"] == image]
        path = folder / f"worst_{rank:02d}_{Path(dataset.path(index_of[image])).stem}.png"
        save_figure(path, draw_image(dataset, index_of[image], found, missed[image], wrong[image]))


def category_rows(precision: np.ndarray, names: Sequence[str]) -> list[list[Any]]:
    """Return each category's AP over all thresholds, at 0.5 and 0.75, and by size ("" for none), the worst first."""
    mean = precision.mean((0, 1))  # (categories, areas); `NOTHING` is negative
    table = np.column_stack([mean[:, 0], precision[0, :, :, 0].mean(0), precision[5, :, :, 0].mean(0), mean[:, 1:]])
    order = np.lexsort((table[:, 0], table[:, 0] < 0))  # by AP, categories without objects last
    return [[names[i], *("" if value < 0 else f"{100 * value:.2f}" for value in table[i])] for i in order]


def draw_precision_recall(precision: np.ndarray, kind: str) -> Figure:
    """Draw the categories' mean precision over recall, at IoU 0.5 and 0.75 and averaged over COCO's thresholds."""
    precision = precision[:, :, (precision > NOTHING).any(axis=(0, 1))]  # only categories with objects
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.add_subplot(
        xlabel="Recall", ylabel="Precision", ylim=(0, 1.02), title=f"{kind}, objects of all sizes"
    )
    if precision.size:
        parts = {"IoU 0.5": precision[:1], "IoU 0.75": precision[5:6], "mean of IoU 0.5 to 0.95": precision}
        for name, part in parts.items():
            curve = part.mean((0, 2))
            axes.plot(RECALLS, curve, label=f"{name}: AP {100 * curve.mean():.1f}", linewidth=1.8)
        axes.legend(frameon=False, fontsize=7)
    axes.grid(alpha=0.3)
    return figure


def count_mistakes(ground_truth: dict[str, Any], results: Sequence[Result]) -> tuple[Counter[int], Counter[int]]:
    """Count missed objects and wrong predictions by image id; predictions in a crowd are not wrong."""
    truth = COCO(ground_truth, use_deepcopy=True)
    found = COCOeval_faster(truth, truth.loadRes(results_of(results, "box")), "bbox", extra_calc=True)
    found.params.iouThrs, found.params.maxDets = np.array([MATCH]), [len(results)]
    found.evaluate()
    found.accumulate()  # marks false negatives and positives
    missed = Counter(entry["image_id"] for entry in truth.anns.values() if "fn" in entry and not entry["iscrowd"])
    wrong = Counter(entry["image_id"] for entry in found.cocoDt.anns.values() if "fp" in entry)
    return missed, wrong


def draw_image(dataset: CocoImages, index: int, results: Sequence[Result], missed: int, wrong: int) -> Figure:
    """Draw an image's true objects next to its predictions."""
    image = dataset.image(index)
    objects = [entry for entry in dataset.annotations(index) if not entry["iscrowd"]]
    names = dict(zip(dataset.category_ids, dataset.class_names, strict=True))
    scale = 6 / max(image.size)
    figure = Figure(figsize=(2 * image.width * scale, image.height * scale + 0.6), layout="constrained")
    figure.suptitle(f"{Path(dataset.path(index)).name}: {missed} missed, {wrong} wrong", fontsize=10)
    for axes, title, entries in zip(figure.subplots(1, 2), ("truth", "prediction"), (objects, results), strict=True):
        axes.imshow(draw_objects(image, entries, names))
        axes.set_title(f"{title}, {len(entries)} objects", fontsize=9)
        axes.set_axis_off()
    return figure
