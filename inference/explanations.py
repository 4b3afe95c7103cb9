"""Explain a prediction by the parts of the image that support the class."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from models import LoadedModel
from utils import UserError, make_directory

from .output_files import as_label

CELLS = 14  # rows and columns of the evidence map
HIDDEN = 4  # rows and columns of cells that are hidden at a time


def overlay_paths(files: Sequence[Path], folder: Path, flag: str, suffix: str) -> list[Path]:
    """Return the paths of the overlays in a new folder; raise UserError if two of them are the same."""
    paths = [folder / f"{file.stem}_{suffix}.png" for file in files]
    if repeated := [path.name for path, count in Counter(paths).items() if count > 1]:
        raise UserError(f"{flag}: several images would share the file {repeated[0]}; process them separately")
    make_directory(folder)
    return paths


@torch.no_grad()
def class_evidence(predict: Callable[[Tensor], Tensor], image: Tensor, target: int, batch_size: int = 32) -> Tensor:
    """Compute a (rows, columns) map of the evidence for a class, 1 for the most, 0 for none or evidence against it.

    Occlusion (Zeiler and Fergus, 2014, arXiv:1311.2901, section 4.2): blur squares of 2/7 of the image's sides
    beyond recognition, one at a time. A cell's evidence is the mean drop of the logit over the squares that cover
    it. The mean of all logits is subtracted first, because softmax ignores it.

    Maps from the last tokens (class activation maps, Grad-CAM) would be misleading: the mixers here are global from
    the first block on, so a token's features need not come from its position in the image.

    Args:
        predict: function from images (B, 3, H, W) to logits (B, classes).
        image: normalized image (3, H, W).
        target: index of the class.
        batch_size: images per call of `predict`.
    """

    def scores(images: Tensor) -> Tensor:
        logits = predict(images).float()
        return logits[:, target] - logits.mean(1)

    size = image.shape[1:]
    rows, columns = (max(HIDDEN, min(CELLS, side // 4)) for side in size)
    places = [(top, left) for top in range(rows - HIDDEN + 1) for left in range(columns - HIDDEN + 1)]
    squares = image.new_zeros(len(places), 1, rows, columns)
    for square, (top, left) in zip(squares, places, strict=True):
        square[:, top : top + HIDDEN, left : left + HIDDEN] = 1
    blurred = blur(image, max(size) // 4)
    hidden = (nn.functional.interpolate(part, size) > 0 for part in squares.split(batch_size))
    drops = scores(image[None]) - torch.cat([scores(torch.where(part, blurred, image)) for part in hidden])
    heat = ((drops.view(-1, 1, 1, 1) * squares).sum((0, 1)) / squares.sum((0, 1))).clamp_min(0).cpu()
    return heat / heat.max().clamp_min(1e-12)


def blur(image: Tensor, radius: int) -> Tensor:
    """Average (3, H, W) twice over squares that extend `radius` pixels to each side, fewer at the borders."""
    for _ in range(2):
        rows = nn.functional.avg_pool2d(image, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        image = nn.functional.avg_pool2d(rows, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)
    return image


def displayable(image: Tensor, loaded: LoadedModel) -> Tensor:
    """Convert a normalized image (3, H, W) to (H, W, 3) with values between 0 and 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (loaded.mean, loaded.std))
    return (image.detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def draw_overlay(image: Tensor, heat: Tensor, title: str) -> Figure:
    """Draw the input image (H, W, 3) and, next to it, the map (h, w) over a grey copy of the image."""
    height, width = image.shape[:2]
    figure = Figure(figsize=(5.2 * min(width / height, 2) + 0.6, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(image.numpy(), interpolation="nearest")
    left.set_title("input", fontsize=9)
    right.imshow(0.15 + 0.7 * image.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    colours = {"cmap": "plasma", "vmin": 0, "vmax": 1, "alpha": 0.65 * heat.numpy()}  # no evidence is transparent
    evidence = right.imshow(heat.numpy(), **colours, interpolation="nearest", extent=whole)
    right.set_title("occlusion: the logit drops\nwhere the image is hidden", fontsize=9)
    for axes in (left, right):
        axes.set_axis_off()
    figure.suptitle(as_label(title, 100), fontsize=10)
    figure.colorbar(evidence, ax=right, fraction=0.046, pad=0.02, label="relative to the largest")
    return figure
