#!/usr/bin/env python
"""Draw what the spectral and scattering layers of a checkpoint have learned, as the papers' figures do.

Spectral gates: the magnitude of their frequency response over the whole plane, zero frequency in the centre
(gates_magnitude), and the kernels with which they convolve (gates_kernels). Scattering layers: the low-pass
weights (scattering_low_pass), the matrices of Einstein blending (scattering_blending), and the energy of the
six oriented bands of real images before and after it (scattering_orientations). That energy depends on
images, because a layer has the same weights for all orientations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from cli import COUNT, POSITIVE, Parser, dashed
from datasets import build_transform, read_image
from infer import ModelInfo, build_from_checkpoint, image_files, save_figure
from models.layers import Grid
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate
from utils import UserError, make_directory, run_cli

ORIENTATIONS = ("15°", "45°", "75°", "105°", "135°", "165°")
PANEL = 0.95  # inches
FONT = 7
LEGEND = {
    "title": "energy, % of all bands",
    "title_fontsize": FONT,
    "fontsize": FONT - 1,
    "frameon": False,
    "ncols": 2,
    "loc": "lower center",
    "bbox_to_anchor": (0.5, 0.97),
    "handlelength": 1,
}

# ---------------------------------------------------------------------------------------------- what is drawn


def transfer_functions(gate: SpectralGate) -> Tensor:
    """The complex frequency response (C, H, W) of a gate over the full plane, zero frequency first.

    The gate stores half of it, and `irfft2` ignores what the weights of columns 0 and W / 2 would add to the
    imaginary part; so the response is that of the real kernel with which the gate convolves.
    """
    return torch.fft.fft2(spatial_kernels(gate))


def spatial_kernels(gate: SpectralGate) -> Tensor:
    """The real kernels (C, H, W), origin first, with which a gate convolves its grid circularly."""
    weight = torch.view_as_complex(gate.complex_weight.detach().double().contiguous())
    return torch.fft.irfft2(weight, s=gate.grid_size, dim=(0, 1)).permute(2, 0, 1)


@torch.no_grad()
def orientation_energies(
    model: nn.Module, mixers: Sequence[ScatteringMixer], images: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Energy of the oriented bands, before and after blending, of each mixer for images (B, 3, H, W).

    Each is (6, h, w): |z|^2 summed over channels, averaged over images. What blending makes of empty bands, from
    its biases, is subtracted first: it is the same for every image and orientation.
    """
    bands: dict[nn.Module, Tensor] = {}
    hooks = [
        mixer.wavelet.register_forward_hook(lambda module, _, out: bands.update({module: out[1]})) for mixer in mixers
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    energies = []
    for mixer in mixers:
        before = bands[mixer.wavelet]
        after = blended(mixer, before) - blended(mixer, torch.zeros_like(before[:, :, :1]))
        energies.append((energy(before), energy(after)))
    return energies


def blended(mixer: ScatteringMixer, bands: Tensor) -> Tensor:
    """What a mixer's inverse transform gets for bands (2, 6, B, h, w, C)."""
    for name in ("channel_blend", "token_blend"):
        bands = getattr(mixer, name)(bands) if hasattr(mixer, name) else bands
    return bands


def energy(bands: Tensor) -> Tensor:
    return bands.double().square().sum((0, -1)).mean(1)


def chosen_channels(wanted: Sequence[int], channels: int) -> list[int]:
    """One number: so many channels, evenly spaced; several: these. UserError for one that is not there."""
    if len(wanted) == 1:
        return np.unique(np.linspace(0, channels - 1, wanted[0]).round().astype(int)).tolist()
    if max(wanted) >= channels:
        raise UserError(f"--channels {max(wanted)}: a layer has only {channels}, numbered from 0")
    return list(wanted)


def layer_name(path: str) -> str:
    """``stages.0.blocks.2.mixer`` -> "stage 1\\nblock 3"; ``blocks.2.mixer`` -> "block 3"."""
    parts = path.split(".")
    kinds = {"stages": "stage", "blocks": "block"}
    return "\n".join(
        f"{kinds[word]} {int(number) + 1}" for word, number in zip(parts, parts[1:], strict=False) if word in kinds
    )


def layers(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """The mixers of a kind, by the name to write beside them."""
    return {layer_name(path): module for path, module in model.named_modules() if isinstance(module, kind)}


# ------------------------------------------------------------------------------------------------ the figures


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


def draw_orientations(energies: dict[str, tuple[Tensor, Tensor]], title: str) -> Figure:
    """A row a layer: the bands' amplitude after blending, and their energies before and after."""
    figure, axes = panel_grid(len(energies), 8, panel=1.1)
    grid = axes[0, 0].get_gridspec()
    figure.suptitle(title, fontsize=FONT + 2)
    for number, (row, (name, (before, after))) in enumerate(zip(axes, energies.items(), strict=True)):
        amplitude = after.sqrt().numpy()
        limit = float(np.quantile(amplitude, 0.999)) or 1.0
        for panel, plane, angle in zip(row, amplitude, ORIENTATIONS, strict=False):
            image = panel.imshow(plane, cmap="magma", vmin=0, vmax=limit)
            bare(panel, angle if number == 0 else "")
        name_row(row[0], name)
        colour_bar(figure, image, row[:6], "amplitude")
        for unused in row[6:]:
            unused.remove()
        bars = figure.add_subplot(grid[number, 6:])
        draw_shares(bars, before, after)
        if number == 0:
            bars.legend(**LEGEND)
    return figure


def draw_shares(axes: Axes, before: Tensor, after: Tensor) -> None:
    """Bars: each orientation's part of the energy, in per cent."""
    places = np.arange(len(ORIENTATIONS))
    for offset, energy, label, colour in ((-0.2, before, "before", "0.65"), (0.2, after, "after", "#b5367a")):
        share = 100 * energy.sum((1, 2)) / energy.sum().clamp_min(1e-30)
        axes.bar(places + offset, share.numpy(), 0.38, label=label, color=colour)
    axes.set_xticks(places, ORIENTATIONS)
    axes.tick_params(labelsize=FONT - 1, length=2)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.spines[["top", "right"]].set_visible(False)


def draw_blending(mixers: dict[str, ScatteringMixer], title: str) -> Figure:
    """A row a layer: |W1| and |W2| of Einstein blending, at most four blocks of each."""
    figure, axes = panel_grid(len(mixers), 8)
    figure.suptitle(title, fontsize=FONT + 2)
    for row, (name, mixer) in zip(axes, mixers.items(), strict=True):
        blend, unit = (mixer.token_blend, "row") if mixer.mixing == "token" else (mixer.channel_blend, "block")
        shown = chosen_channels([4], blend.weight1.shape[1])
        magnitudes = [weight.detach().norm(dim=0)[shown].numpy() for weight in (blend.weight1, blend.weight2)]
        panels = [
            (f"|W{layer}| {unit} {block}", matrix)
            for layer, stack in enumerate(magnitudes, 1)
            for block, matrix in zip(shown, stack, strict=True)
        ]
        limit = float(np.quantile(np.stack(magnitudes), 0.999)) or 1.0
        for panel, (label, matrix) in zip(row, panels, strict=False):
            image = panel.imshow(matrix, cmap="magma", vmin=0, vmax=limit)
            bare(panel, label)
        for empty in row[len(panels) :]:
            empty.set_axis_off()
        name_row(row[0], name)
        colour_bar(figure, image, row, "magnitude")
    return figure


# ------------------------------------------------------------------------------------------------ the command


def gate_figures(gates: dict[str, SpectralGate], info: ModelInfo, channels: Sequence[int]) -> dict[str, Figure]:
    responses = {name: torch.fft.fftshift(transfer_functions(gate).abs(), dim=(1, 2)) for name, gate in gates.items()}
    kernels = {name: torch.fft.fftshift(spatial_kernels(gate), dim=(1, 2)) for name, gate in gates.items()}
    return {
        "gates_magnitude": draw_planes(
            responses,
            channels,
            f"{info.arch}: magnitude of the spectral gates",
            "|W|",
            signed=False,
            label_axes=frequency_axes,
        ),
        "gates_kernels": draw_planes(
            kernels,
            channels,
            f"{info.arch}: spatial kernels of the spectral gates",
            "weight",
            signed=True,
            label_axes=token_axes,
        ),
    }


def scattering_figures(
    model: nn.Module,
    mixers: dict[str, ScatteringMixer],
    info: ModelInfo,
    channels: Sequence[int],
    pictures: Sequence[Image.Image],
) -> dict[str, Figure]:
    transform = build_transform(
        False,
        info.input_size,
        mean=info.mean,
        std=info.std,
        crop_pct=info.crop_pct,
        interpolation=info.interpolation,
    )
    images = torch.stack([transform(picture) for picture in pictures])
    energies = dict(zip(mixers, orientation_energies(model, list(mixers.values()), images), strict=True))
    low_pass = {name: mixer.low_pass.detach().permute(2, 0, 1) for name, mixer in mixers.items()}
    return {
        "scattering_low_pass": draw_planes(
            low_pass,
            channels,
            f"{info.arch}: low-pass weights",
            "weight",
            signed=True,
            label_axes=position_axes,
        ),
        "scattering_blending": draw_blending(
            mixers, f"{info.arch}: Einstein blending, |W| from input (down) to output (across)"
        ),
        "scattering_orientations": draw_orientations(
            energies,
            f"{info.arch}: oriented bands of {len(images)} image{'s' * (len(images) > 1)} after blending",
        ),
    }


def channel_list(text: str) -> list[int]:
    """``"8"`` -> [8]; ``"0,5,9"`` -> [0, 5, 9]."""
    return [(COUNT if "," in text else POSITIVE)(word) for word in text.split(",")]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("checkpoint", type=Path, help="of training, or the authors'")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the figures go")
    parser.add_argument("--arch", metavar="NAME", help="where the checkpoint does not know it")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the average of the weights (default: if the checkpoint has one)",
    )
    parser.add_argument(
        "--channels",
        type=channel_list,
        default=[8],
        metavar="N|A,B,...",
        help="how many channels, evenly spaced (default: 8), or which",
    )
    parser.add_argument(
        "--image",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="images or folders for the oriented bands (default: scikit-learn's two photographs)",
    )
    parser.add_argument("--format", choices=["png", "pdf", "svg"], default="png", help="of the figures (default: png)")
    return parser.parse_args([dashed(word) for word in (sys.argv[1:] if argv is None else argv)])


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, info = build_from_checkpoint(args.checkpoint, args.arch, ema=args.ema)
    gates, mixers = layers(model, SpectralGate), layers(model, ScatteringMixer)
    if not gates and not mixers:
        raise UserError(f"{args.checkpoint}: {info.arch} has neither spectral gates nor scattering layers")
    pictures = (
        [Image.fromarray(pixels) for pixels in load_sample_images().images]
        if args.image is None
        else [read_image(path, upright=True) for path in image_files(args.image)]
    )
    figures = gate_figures(gates, info, args.channels) if gates else {}
    if mixers:
        figures |= scattering_figures(model, mixers, info, args.channels, pictures)
    make_directory(args.output)
    for name, figure in figures.items():
        save_figure(args.output / f"{name}.{args.format}", figure)
        print(args.output / f"{name}.{args.format}")


if __name__ == "__main__":
    run_cli(main)
