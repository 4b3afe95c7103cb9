"""The figures."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from inference.output_files import as_label
from models.layers import Grid
from models.scattering import MIXINGS, ScatteringMixer
from utils import UserError

ORIENTATIONS = ("15°", "45°", "75°", "105°", "135°", "165°")
PANEL = 0.95  # inches
FONT = 7


def chosen_channels(wanted: Sequence[int], channels: int) -> list[int]:
    """One number: so many channels, evenly spaced; several: these. UserError for one that is not there."""
    if len(wanted) == 1:
        return np.unique(np.linspace(0, channels - 1, wanted[0]).round().astype(int)).tolist()
    if max(wanted) >= channels:
        raise UserError(f"--channels {max(wanted)}: a layer has only {channels}, numbered from 0")
    return list(wanted)


def panel_grid(rows: int, columns: int, panel: float = PANEL) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(columns * panel + 1.5, rows * (panel + 0.17) + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    return figure, figure.subplots(rows, columns, squeeze=False)


def bare(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=FONT, pad=2)


def name_row(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=FONT + 1, rotation=0, ha="right", va="center")
    axes.yaxis.set_label_coords(-0.3, 0.5)  # in line with the rows that have no ticks


def colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    bar = figure.colorbar(image, ax=list(axes), fraction=0.02, pad=0.01, aspect=14)
    bar.locator = MaxNLocator(3)
    bar.ax.tick_params(labelsize=FONT - 1, length=2)
    bar.formatter.set_useMathText(True)
    bar.ax.yaxis.get_offset_text().set_size(FONT - 1)  # the power of ten
    bar.set_label(label, fontsize=FONT)


def draw_planes(
    planes: dict[str, Tensor],
    channels: Sequence[int],
    title: str,
    quantity: str,
    signed: bool,
    label_axes: Callable[[Axes, Grid], None],
) -> Figure:
    """A row of panels a layer: the mean over channels, then chosen channels, on the row's colour scale.

    Args:
        planes: by layer name (C, H, W), as they are to be seen.
        channels: how many (one number), or which.
        title: of the figure.
        quantity: what the colours say.
        signed: colours diverge from zero, and the first panel is the mean of |.|.
        label_axes: puts units on the last row's first panel.
    """
    chosen = {name: chosen_channels(channels, len(stack)) for name, stack in planes.items()}
    figure, axes = panel_grid(len(planes), 1 + max(map(len, chosen.values())))
    figure.suptitle(title, fontsize=FONT + 2)
    for row, (name, stack) in zip(axes, planes.items(), strict=True):
        shown = [stack.abs().mean(0), *stack[chosen[name]]]
        titles = ["mean of |·|" if signed else "mean", *(f"channel {channel}" for channel in chosen[name])]
        limit = float(torch.stack(shown[1:]).abs().quantile(0.999)) or 1.0
        style = {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "magma", "vmin": 0.0}
        for panel, plane, label in zip(row, shown, titles, strict=False):
            image = panel.imshow(plane.numpy(), vmax=limit, **style)
            bare(panel, label)
        for empty in row[len(shown) :]:
            empty.set_axis_off()
        name_row(row[0], name)
        colour_bar(figure, image, row, quantity)
    label_axes(axes[-1, 0], tuple(stack.shape[1:]))
    return figure


def frequency_axes(axes: Axes, grid: Grid) -> None:
    """Ticks of an fftshifted plane in cycles a token; the Nyquist frequency is the first row and column."""
    for size, set_ticks in ((grid[1], axes.set_xticks), (grid[0], axes.set_yticks)):
        set_ticks([size // 2 + part * size for part in (-0.5, -0.25, 0, 0.25)], ["−½", "−¼", "0", "¼"])
    label_ticks(axes, "cycles / token")


def token_axes(axes: Axes, grid: Grid) -> None:
    """Ticks at the ends and the centre, in tokens from the centre."""
    for size, set_ticks in ((grid[1], axes.set_xticks), (grid[0], axes.set_yticks)):
        set_ticks([0, size // 2, size - 1], [f"−{size // 2}", "0", str(size - 1 - size // 2)])
    label_ticks(axes, "tokens")


def position_axes(axes: Axes, grid: Grid) -> None:
    """Ticks at the first and last position."""
    for size, set_ticks in ((grid[1], axes.set_xticks), (grid[0], axes.set_yticks)):
        set_ticks([0, size - 1])
    label_ticks(axes, "position (tokens)")


def label_ticks(axes: Axes, unit: str) -> None:
    axes.tick_params(labelsize=FONT - 1, length=2, pad=1)
    axes.set_xlabel(unit, fontsize=FONT, labelpad=1)


def draw_orientations(image: np.ndarray, energies: dict[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """The image (H, W, 3), and beside it a row a layer: the amplitude of its bands after blending, and shares.

    energies: by layer name those of the image's oriented bands (6, h, w) before and after blending.
    """
    rows = len(energies)
    figure = Figure(figsize=(11.5, max(rows * 1.35, 2.2) + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.02)
    figure.suptitle(as_label(title, 100), fontsize=FONT + 2)
    grid = figure.add_gridspec(rows, 8, width_ratios=[1.7, *[1.0] * 6, 2.2])
    original = figure.add_subplot(grid[:, 0])
    original.set_anchor("N")
    original.imshow(image)
    bare(original, "the image")
    for number, (name, (before, after)) in enumerate(energies.items()):
        amplitude = after.sqrt().numpy()
        limit = float(np.quantile(amplitude, 0.999)) or 1.0
        panels = [figure.add_subplot(grid[number, column]) for column in range(1, 7)]
        for panel, plane, angle in zip(panels, amplitude, ORIENTATIONS, strict=True):
            shown = panel.imshow(plane, cmap="magma", vmin=0, vmax=limit)
            bare(panel, angle if number == 0 else "")
        name_row(panels[0], name)
        colour_bar(figure, shown, panels, "amplitude")
        bars = figure.add_subplot(grid[number, 7])
        draw_shares(bars, before, after)
        if number == 0:
            bars.legend(fontsize=FONT - 1, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.97))
    bars.set_xlabel("orientation of the band", fontsize=FONT, labelpad=1)
    return figure


def draw_shares(axes: Axes, before: Tensor, after: Tensor) -> None:
    """Bars: each orientation's part of the energy, in per cent."""
    places = np.arange(len(ORIENTATIONS))
    for offset, energy, label, colour in (
        (-0.2, before, "before blending", "0.65"),
        (0.2, after, "after", "#b5367a"),
    ):
        share = 100 * energy.sum((1, 2)) / energy.sum().clamp_min(1e-30)
        axes.bar(places + offset, share.numpy(), 0.38, label=label, color=colour)
    axes.set_xticks(places, ORIENTATIONS)
    axes.set_ylabel("% of the energy", fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1, length=2)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.spines[["top", "right"]].set_visible(False)


def draw_blending(mixers: dict[str, ScatteringMixer], title: str) -> Figure:
    """A row a layer: what its `blending_weights` are."""
    figure, axes = panel_grid(len(mixers), 8)
    figure.suptitle(title, fontsize=FONT + 2)
    for row, (name, mixer) in zip(axes, mixers.items(), strict=True):
        panels = blending_weights(mixer)
        limit = float(np.quantile(np.stack([*panels.values()]), 0.999)) or 1.0
        for panel, (label, matrix) in zip(row, panels.items(), strict=False):
            image = panel.imshow(matrix, cmap="magma", vmin=0, vmax=limit)
            bare(panel, label)
        for empty in row[len(panels) :]:
            empty.set_axis_off()
        name_row(row[0], name)
        colour_bar(figure, image, row, "magnitude")
    return figure


def blending_weights(mixer: ScatteringMixer) -> dict[str, np.ndarray]:
    """Magnitudes of what a mixer's first blending multiplies the bands by, by what to write above them.

    Einstein blending: matrices of both layers, at most four blocks of each. Tensor blending: the mean over channels, an
    (h, w) plane an orientation.
    """
    if mixer.mixing == "tensor":
        planes = mixer.tensor_blend.weight.detach().unflatten(0, (2, 6)).norm(dim=0).mean(-1)
        return {f"|W| {angle}": plane.numpy() for angle, plane in zip(ORIENTATIONS, planes, strict=True)}
    name = MIXINGS[mixer.mixing][0]
    blend, unit = mixer.get_submodule(name), "row" if name == "token_blend" else "block"
    shown = chosen_channels([4], blend.weight1.shape[1])
    return {
        f"|W{layer}| {unit} {block}": matrix
        for layer, weight in enumerate((blend.weight1, blend.weight2), 1)
        for block, matrix in zip(shown, weight.detach().norm(dim=0)[shown].numpy(), strict=True)
    }
