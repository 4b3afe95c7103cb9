"""Report on a classifier's confusions: tables and a figure of the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from .output_files import as_label, save_figure, write_csv

NAMED_CLASSES = 60  # the figure labels at most this many classes
COUNTED_CLASSES = 20  # the figure shows counts for at most this many classes


def class_accuracies(confusion: np.ndarray) -> np.ndarray:
    """Return the share of each class's images that were classified correctly; NaN for a class without images."""
    with np.errstate(invalid="ignore"):
        return confusion.diagonal() / confusion.sum(1)


def write_report(folder: Path, confusion: np.ndarray, names: Sequence[str], title: str) -> None:
    """Write `confusion_matrix.csv`, `confusion_matrix.png` and `per_class.csv`, the worst class first."""
    write_csv(
        folder / "confusion_matrix.csv",
        ["true \\ predicted", *names],
        [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)],
    )
    accuracies, precisions = 100 * class_accuracies(confusion), 100 * class_accuracies(confusion.T)
    rows = []
    for i in np.argsort(accuracies, kind="stable"):  # NaN comes last
        counts = [confusion[i].sum(), confusion[i, i], f"{accuracies[i]:.2f}", f"{precisions[i]:.2f}"]
        errors = np.where(np.arange(len(names)) == i, 0, confusion[i])
        rows.append([i, names[i], *counts, names[errors.argmax()] if errors.any() else ""])
    header = ["index", "class", "images", "correct", "accuracy", "precision", "most often taken for"]
    write_csv(folder / "per_class.csv", header, rows)
    save_figure(folder / "confusion_matrix.png", draw_confusion(confusion, names, title))


def draw_confusion(confusion: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """Draw the confusion matrix, each row in per cent of its true class; label it if there are few classes."""
    classes = len(names)
    side = min(max(0.42 * classes, 2.8), 8.0)
    figure = Figure(figsize=(side + 1.6, side + 1.2), layout="constrained")
    figure.suptitle(as_label(title, 100), fontsize=10)
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    picture = axes.imshow(share, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    if classes <= COUNTED_CLASSES:
        for (row, column), count in np.ndenumerate(confusion):
            colour = "white" if share[row, column] > 30 else "black"
            axes.text(column, row, count or "", ha="center", va="center", fontsize=8, color=colour)
    if classes <= NAMED_CLASSES:
        labels, size = [as_label(name) for name in names], 9 if classes <= COUNTED_CLASSES else 5.5
        axes.set_yticks(range(classes), labels, fontsize=size)
        axes.set_xticks(range(classes), labels, fontsize=size, rotation=45, ha="right", rotation_mode="anchor")
    figure.colorbar(picture, ax=axes, fraction=0.045, pad=0.02, label="% of the true class")
    return figure
