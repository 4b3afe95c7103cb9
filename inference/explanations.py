"""Which parts of an image spoke for a class."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn

import models
from models import LoadedModel
from models.base import ImageModel
from training.precision import Precision, as_input
from utils import UserError

from .output_files import as_label, prepare_folder

# Perceptually uniform, and the less opaque the less there is to say: the photograph stays to be seen.
_colours = matplotlib.colormaps["plasma"](np.linspace(0, 1, 256))
_colours[:, 3] = np.linspace(0, 0.65, 256)
SEE_THROUGH = ListedColormap(_colours)
CELLS = 14  # rows and columns of the map that explains a prediction
HIDDEN = 4  # of those, in each direction, that are hidden at a time


def overlay_paths(
    files: Sequence[Path], folder: Path, flag: str = "--explain", suffix: str = "explained"
) -> list[Path]:
    """Where the overlays go; UserError if two images would share one, or an image be replaced."""
    paths = [folder / f"{file.stem}_{suffix}.png" for file in files]
    taken: dict[Path, Path] = {}
    for file, path in zip(files, paths, strict=True):
        if path in taken:
            raise UserError(f"{flag}: {taken[path]} and {file} have the same name; take them one by one")
        if path.exists() and path.resolve() in {other.resolve() for other in files}:
            raise UserError(f"{flag}: the overlay {path} would replace one of the images")
        taken[path] = file
    prepare_folder(folder)
    return paths


def explain(
    model: nn.Module,
    image: Tensor,
    target: int,
    predict: Callable[[Tensor], Tensor],
    precision: Precision,
    batch_size: int,
) -> dict[str, Tensor]:
    """Maps (rows, columns) of what spoke for a class in an image (3, H, W), by title; the more reliable one first.

    A class activation exists for this project's models alone, and is left out where it has a single cell.
    """
    maps = {"occlusion: the logit drops\nwhere the image is hidden": class_evidence(predict, image, target, batch_size)}
    if isinstance(model, ImageModel):
        with precision.autocast():
            activation = class_activation(model, as_input(image[None], precision), target)
        if activation.numel() > 1:
            rows, columns = activation.shape
            maps[f"class activation, {rows}x{columns}:\nwhat the last tokens say"] = activation
    return maps


@torch.no_grad()
def class_evidence(predict: Callable[[Tensor], Tensor], image: Tensor, target: int, batch_size: int = 32) -> Tensor:
    """How much each part of an image spoke for a class: a (rows, columns) map, 1 the most, 0 nothing or against.

    Occlusion (Zeiler and Fergus, 2014, arXiv:1311.2901, section 4.2): squares of 2/7 of the image's sides are
    blurred beyond recognition one after another, and a cell's evidence is the mean drop of the logit over the
    squares that cover it. The logit counts less the mean of all, since a softmax does not see what they share.

    It asks the model itself, unlike maps read off the last tokens (`class_activation`, Grad-CAM and their kin):
    the mixers here are global from the first block on, so what is in a token in the end need not come from its
    place in the image.

    Args:
        predict: images (B, 3, H, W) to logits (B, classes).
        image: (3, H, W), normalised.
        target: the class.
        batch_size: images a call of `predict`.
    """
    rows, columns = (max(HIDDEN, min(CELLS, side // 4)) for side in image.shape[1:])
    row_of, column_of = (
        torch.arange(side, device=image.device) * cells // side
        for side, cells in zip(image.shape[1:], (rows, columns), strict=True)
    )
    places = (rows - HIDDEN + 1, columns - HIDDEN + 1)
    top, left = torch.cartesian_prod(*map(torch.arange, places)).to(image.device).unsqueeze(-1).unbind(1)
    in_rows, in_columns = (row_of - top) // HIDDEN == 0, (column_of - left) // HIDDEN == 0  # (squares, side)
    blurred = blur(image, max(image.shape[1:]) // 4)
    scores = []
    for begin in range(0, len(top), batch_size):
        part = slice(begin, begin + batch_size)
        inside = in_rows[part, :, None] & in_columns[part, None, :]
        scores.append(centred(predict(torch.where(inside[:, None], blurred, image)), target))
    drops = centred(predict(image[None]), target) - torch.cat(scores)
    kernel = torch.ones(1, 1, HIDDEN, HIDDEN, dtype=drops.dtype, device=drops.device)
    sums, counts = (
        nn.functional.conv_transpose2d(values.view(1, 1, *places), kernel)[0, 0]
        for values in (drops, torch.ones_like(drops))
    )
    return relative(sums / counts)


@torch.no_grad()
def class_activation(model: ImageModel, images: Tensor, target: int) -> Tensor:
    """Where the last tokens of one image (1, 3, H, W) say a class: (rows, columns), 1 the most, 0 nothing or against.

    A class activation map (Zhou et al., 2016, arXiv:1512.04150): the tokens' own logits, less the mean of all
    classes. The vanilla models' logits are the mean of these; pyramids read theirs off the class token, and
    those trained with token labels have a classifier of tokens, which is taken.
    """
    grid = model.token_label_size if isinstance(model, models.Pyramid) else model.grid_size
    head = model.aux_head if getattr(model, "aux_head", None) is not None else model.head
    tokens = model.forward_features(images)[0, model.num_prefix_tokens :]
    return relative(centred(head(tokens), target).view(grid))


def relative(heat: Tensor) -> Tensor:
    """Nothing for what is negative, the rest as parts of the largest, on the CPU."""
    heat = heat.float().clamp_min(0).cpu()
    return heat / heat.max().clamp_min(1e-12)


def centred(logits: Tensor, target: int) -> Tensor:
    """(B,) float: the logit of a class less the mean of all."""
    return logits[:, target].float() - logits.float().mean(1)


def blur(image: Tensor, radius: int) -> Tensor:
    """(3, H, W), averaged twice over squares of that many pixels to each side, less at the borders."""
    for _ in range(2):
        rows = nn.functional.avg_pool2d(image, (2 * radius + 1, 1), 1, (radius, 0), count_include_pad=False)
        image = nn.functional.avg_pool2d(rows, (1, 2 * radius + 1), 1, (0, radius), count_include_pad=False)
    return image


def displayable(image: Tensor, loaded: LoadedModel) -> Tensor:
    """A normalised (3, H, W) image as (H, W, 3) between 0 and 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (loaded.mean, loaded.std))
    return (image.detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0)


def draw_overlay(image: Tensor, maps: Mapping[str, Tensor], title: str) -> Figure:
    """The image (H, W, 3) as the model saw it, and under each map's name the map (h, w) over it, cell by cell."""
    height, width = image.shape[:2]
    whole = (-0.5, width - 0.5, height - 0.5, -0.5)
    panels = 1 + len(maps)
    figure = Figure(figsize=(panels * 2.6 * min(width / height, 2) + 0.6, 3.1), layout="constrained")
    left, *others = figure.subplots(1, panels)
    left.imshow(image.numpy(), interpolation="nearest")
    left.set_title("input", fontsize=9)
    for axes, (name, heat) in zip(others, maps.items(), strict=True):
        axes.imshow(0.15 + 0.7 * image.mean(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        colours = axes.imshow(heat.numpy(), cmap=SEE_THROUGH, vmin=0, vmax=1, interpolation="nearest", extent=whole)
        axes.set_title(name, fontsize=9)
    for axes in (left, *others):
        axes.set_axis_off()
    figure.suptitle(as_label(title, 100), fontsize=10)
    bar = figure.colorbar(colours, ax=others[-1], fraction=0.046, pad=0.02, ticks=[0, 0.5, 1])
    bar.ax.set_facecolor("0.5")  # colours as they are over a photograph in grey
    bar.set_label("relative to the largest", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure
