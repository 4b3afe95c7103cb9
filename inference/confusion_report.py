"""What a classifier confuses: tables and a picture of the confusion matrix."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter
from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix, precision_score, recall_score

from .output_files import as_label, save_figure, write_csv

NAMED_CLASSES = 60  # up to so many classes a confusion matrix has their names at its sides
COUNTED_CLASSES = 20  # and up to so many the counts in its cells
SHOWN_CONFUSIONS = 15


def class_accuracies(pairs: np.ndarray, classes: int) -> np.ndarray:
    """The part of each class's images that were recognised, from (2, images); NaN where there are none."""
    return recall_score(*pairs, labels=range(classes), average=None, zero_division=np.nan)


def write_report(folder: Path, pairs: np.ndarray, names: Sequence[str], title: str) -> None:
    """`confusion_matrix.csv`, `confusion_matrix.png` and `per_class.csv`, the worst class first."""
    labels = range(len(names))
    confusion = confusion_matrix(*pairs, labels=labels)
    write_csv(
        folder / "confusion_matrix.csv",
        ["true \\ predicted", *names],
        [[name, *row] for name, row in zip(names, confusion.tolist(), strict=True)],
    )
    accuracies = class_accuracies(pairs, len(names))
    precisions = precision_score(*pairs, labels=labels, average=None, zero_division=np.nan)
    rows = [
        [
            i,
            names[i],
            confusion[i].sum(),
            confusion[i, i],
            f"{100 * accuracies[i]:.2f}",
            f"{100 * precisions[i]:.2f}",
            most_confused(confusion, i, names),
        ]
        for i in np.argsort(accuracies, kind="stable")  # NaN comes last
    ]
    header = ["index", "class", "images", "correct", "accuracy", "precision", "most often taken for"]
    write_csv(folder / "per_class.csv", header, rows)
    save_figure(folder / "confusion_matrix.png", draw_confusion(confusion, names, title))


def most_confused(confusion: np.ndarray, index: int, names: Sequence[str]) -> str:
    """The other class for which a class is taken most often, or nothing."""
    others = confusion[index].copy()
    others[index] = 0
    return names[others.argmax()] if others.any() else ""


def draw_confusion(confusion: np.ndarray, names: Sequence[str], title: str) -> Figure:
    """The confusion matrix, each row in per cent of its true class.

    Few classes have names and counts. Many have neither: the commonest confusions are then listed beside it.
    """
    classes = len(names)
    side = min(max(0.42 * classes, 2.8), 8.0)
    listed = classes > COUNTED_CLASSES
    figure = Figure(figsize=(side + 1.6 + (5.0 if listed else 0.0), side + 1.2), layout="constrained")
    panels = figure.subplots(1, 2 if listed else 1, width_ratios=[side, 3.4] if listed else None, squeeze=False)[0]
    axes = panels[0]
    figure.suptitle(as_label(title, 100), fontsize=10)
    share = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(share, display_labels=[as_label(name) for name in names]).plot(
        ax=axes,
        cmap="Blues",
        include_values=not listed,
        colorbar=False,
        text_kw={"fontsize": 8},
        im_kw={"norm": PowerNorm(0.5, 0, 100) if listed else Normalize(0, 100)},
    )
    if not listed:
        for cell, text in np.ndenumerate(display.text_):
            text.set_text(f"{confusion[cell]}" if confusion[cell] else "")
    axes.set(xlabel="predicted", ylabel="true")
    label_classes(axes, classes, upright=max(map(len, names)) <= 3)
    bar = figure.colorbar(display.im_, ax=axes, fraction=0.045, pad=0.02)
    bar.set_label("% of the true class")
    bar.outline.set_visible(False)
    if listed:
        list_confusions(panels[1], confusion, names)
    return figure


def label_classes(axes: Axes, classes: int, upright: bool) -> None:
    """Names that do not overlap at the sides of a confusion matrix; some numbers where there are too many."""
    if classes > NAMED_CLASSES:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(10, integer=True))
            axis.set_major_formatter(ScalarFormatter())
        return
    axes.tick_params(labelsize=9 if classes <= COUNTED_CLASSES else 5.5)
    if not upright:
        for label in axes.get_xticklabels():
            label.set(rotation=45, ha="right", rotation_mode="anchor")


def list_confusions(axes: Axes, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Bars: the pairs of classes that are confused most often."""
    errors = confusion.copy()
    np.fill_diagonal(errors, 0)
    order = np.argsort(errors, axis=None, kind="stable")[::-1][:SHOWN_CONFUSIONS]
    pairs = [(i, j) for i, j in zip(*np.unravel_index(order, errors.shape), strict=True) if errors[i, j]]
    axes.barh(range(len(pairs)), [errors[pair] for pair in pairs], color="#4a90c2", height=0.7)
    axes.set_yticks(range(len(pairs)), [f"{as_label(names[i])} as {as_label(names[j])}" for i, j in pairs], fontsize=7)
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("images")
    axes.set_title("commonest confusions", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
