"""Draw what the spectral and scattering layers of a checkpoint have learned, as the papers' figures do.

Spectral gates: the magnitude of their frequency response over the whole plane, zero frequency in the centre
(gates_magnitude), and the kernels with which they convolve (gates_kernels). Scattering layers: the low-pass
weights (scattering_low_pass), the weights that blend the bands (scattering_blending), and the energy of the
six oriented bands of one image before and after blending (scattering_orientations). That energy depends on the
image: Einstein blending has the same weights for all orientations.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from inference.explanations import displayable
from inference.output_files import as_label, save_figure
from inputs.images import read_image
from models import load_checkpoint
from models.scattering import MIXINGS, ScatteringMixer
from models.spectral_gate import SpectralGate
from runtime.cli import run_cli
from tools.command_line import ToolParser
from training.arguments import COUNT, POSITIVE
from utils import UserError, make_directory

ORIENTATIONS = ("15°", "45°", "75°", "105°", "135°", "165°")
PANEL = 0.95  # inches
FONT = 7


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    info = load_checkpoint(args.checkpoint, args.arch, ema=args.ema)
    model = info.model
    gates, mixers = layers(model, SpectralGate), layers(model, ScatteringMixer)
    if not gates and not mixers:
        raise UserError(f"{args.checkpoint}: {info.arch} has neither spectral gates nor scattering layers")
    figures = {}
    if gates:
        responses = {
            name: torch.fft.fftshift(transfer_functions(gate).abs(), dim=(1, 2)) for name, gate in gates.items()
        }
        kernels = {name: torch.fft.fftshift(spatial_kernels(gate), dim=(1, 2)) for name, gate in gates.items()}
        title = f"{info.arch}: magnitude of the spectral gates"
        figures["gates_magnitude"] = draw_planes(responses, args.channels, title, "|W|", "cycles / token")
        title = f"{info.arch}: spatial kernels of the spectral gates"
        figures["gates_kernels"] = draw_planes(kernels, args.channels, title, "weight", "tokens")
    if mixers:
        low_pass = {name: mixer.low_pass.detach().permute(2, 0, 1) for name, mixer in mixers.items()}
        title = f"{info.arch}: low-pass weights"
        figures["scattering_low_pass"] = draw_planes(low_pass, args.channels, title, "weight", "position (tokens)")
        title = f"{info.arch}: blending of the bands, |W|; matrices from input (down) to output (across)"
        figures["scattering_blending"] = draw_blending(mixers, title)
        photograph = Image.fromarray(load_sample_image("china.jpg"))
        picture = photograph if args.image is None else read_image(args.image, upright=True)
        image = info.transform(picture)
        energies = orientation_energies(model, list(mixers.values()), image[None])
        title = f"{info.arch}: oriented bands of an image after blending"
        shown = displayable(image, info).numpy()
        named = dict(zip(mixers, energies, strict=True))
        figures["scattering_orientations"] = draw_orientations(shown, named, title)
    make_directory(args.output)
    for name, figure in figures.items():
        save_figure(args.output / f"{name}.{args.format}", figure)
        print(args.output / f"{name}.{args.format}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser("visualize_filters", __doc__)
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, a run directory (its best one), or a model with weights")
    add("--output", type=Path, required=True, metavar="DIR", help="where to write the figures")
    add("--arch", metavar="NAME", help="where the checkpoint does not say it")
    averaged = "the average of the weights (default: if the checkpoint has one)"
    add("--ema", action=argparse.BooleanOptionalAction, default=None, help=averaged)
    channels = "how many channels, evenly spaced (default: 8), or which"
    add("--channels", type=channel_list, default=[8], metavar="N|A,B,...", help=channels)
    image = "the image whose oriented bands are drawn (default: a photograph of scikit-learn's)"
    add("--image", type=Path, metavar="FILE", help=image)
    add("--format", choices=["png", "pdf", "svg"], default="png", help="of the figures (default: png)")
    return parser.parse_args(argv)


def channel_list(text: str) -> list[int]:
    """``"8"`` -> [8]; ``"0,5,9"`` -> [0, 5, 9]."""
    return [(COUNT if "," in text else POSITIVE)(word) for word in text.split(",")]


def layers(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    r"""The mixers of a kind, by "stage 1\nblock 3" (pyramids) or "block 3"."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, kind):
            words = path.split(".")
            named = [(word, number) for word, number in zip(words, words[1:], strict=False) if number.isdigit()]
            found["\n".join(f"{word.removesuffix('s')} {int(number) + 1}" for word, number in named)] = module
    return found


# ---------------------------------------------------------------------------------------------------------- responses


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
        after = mixer.blend(before) - mixer.blend(torch.zeros_like(before[:, :, :1]))
        energies.append(tuple(band.double().square().sum((0, -1)).mean(1) for band in (before, after)))
    return energies


def blending_weights(mixer: ScatteringMixer) -> dict[str, np.ndarray]:
    """Magnitudes of the weights by which a mixer's first blending multiplies the bands, by their titles.

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


# ------------------------------------------------------------------------------------------------------------ figures


def chosen_channels(wanted: Sequence[int], channels: int) -> list[int]:
    """One number: so many channels, evenly spaced; several: these. UserError for one that does not exist."""
    if len(wanted) == 1:
        return np.unique(np.linspace(0, channels - 1, wanted[0]).round().astype(int)).tolist()
    if max(wanted) >= channels:
        raise UserError(f"--channels {max(wanted)}: a layer has only {channels}, numbered from 0")
    return list(wanted)


def draw_planes(planes: dict[str, Tensor], channels: Sequence[int], title: str, quantity: str, unit: str) -> Figure:
    """A row of panels for each layer: the mean over channels, then chosen channels, on the row's colour scale.

    Args:
        planes: (C, H, W) by layer name.
        channels: how many (one number), or which.
        title: of the figure.
        quantity: what the colours show; a "weight" has a sign, and its first panel is the mean of the magnitudes.
        unit: of the axes; in "tokens" and "cycles / token" they have their zero in the centre.
    """
    signed = quantity == "weight"
    panels = {}
    for name, stack in planes.items():
        chosen = chosen_channels(channels, len(stack))
        shown = zip(chosen, stack[chosen], strict=True)
        panels[name] = {"mean of |·|" if signed else "mean": stack.abs().mean(0).numpy()} | {
            f"channel {channel}": plane.numpy() for channel, plane in shown
        }
    figure, rows = draw_rows(panels, title, quantity, signed)
    for size, axis in zip(stack.shape[1:], (rows[-1, 0].yaxis, rows[-1, 0].xaxis), strict=True):
        half = size // 2
        if unit == "tokens":
            axis.set_ticks([0, half, size - 1], [f"−{half}", "0", str(size - 1 - half)])
        elif unit == "cycles / token":  # the Nyquist frequency is the first row and column
            axis.set_ticks([half + part * size for part in (-0.5, -0.25, 0, 0.25)], ["−½", "−¼", "0", "¼"])
        else:
            axis.set_ticks([0, size - 1])
    rows[-1, 0].tick_params(labelsize=FONT - 1, length=2, pad=1)
    rows[-1, 0].set_xlabel(unit, fontsize=FONT, labelpad=1)
    return figure


def draw_blending(mixers: Mapping[str, ScatteringMixer], title: str) -> Figure:
    """A row for each layer: its `blending_weights`."""
    panels = {name: blending_weights(mixer) for name, mixer in mixers.items()}
    return draw_rows(panels, title, "magnitude", signed=False)[0]


def draw_rows(
    panels: dict[str, dict[str, np.ndarray]], title: str, quantity: str, signed: bool
) -> tuple[Figure, np.ndarray]:
    """A row for each layer, of planes by their titles, on one colour scale; the figure and its axes."""
    columns = max(map(len, panels.values()))
    size = (columns * PANEL + 1.5, len(panels) * (PANEL + 0.17) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    figure.suptitle(title, fontsize=FONT + 2)
    axes = figure.subplots(len(panels), columns, squeeze=False)
    for row, (name, planes) in zip(axes, panels.items(), strict=True):
        # The first plane of a signed row is a mean, which would narrow the scale.
        limit = float(np.quantile(np.abs(np.stack([*planes.values()][int(signed) :])), 0.999)) or 1.0
        style = {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "magma", "vmin": 0.0}
        for panel, (label, plane) in zip(row, planes.items(), strict=False):
            image = panel.imshow(plane, vmax=limit, **style)
            bare(panel, label)
        for empty in row[len(planes) :]:
            empty.set_axis_off()
        finish_row(figure, row, image, name, quantity)
    return figure, axes


def bare(axes: Axes, title: str) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=FONT, pad=2)


def finish_row(figure: Figure, row: Sequence[Axes], image: AxesImage, name: str, quantity: str) -> None:
    """The layer's name before the row, and its colour bar after it."""
    row[0].set_ylabel(name, fontsize=FONT + 1, rotation=0, ha="right", va="center")
    row[0].yaxis.set_label_coords(-0.3, 0.5)  # in line with the rows that have no ticks
    bar = figure.colorbar(image, ax=list(row), fraction=0.02, pad=0.01, aspect=14)
    bar.locator = MaxNLocator(3)
    bar.ax.tick_params(labelsize=FONT - 1, length=2)
    bar.formatter.set_useMathText(True)
    bar.ax.yaxis.get_offset_text().set_size(FONT - 1)  # the power of ten
    bar.set_label(quantity, fontsize=FONT)


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
        finish_row(figure, panels, shown, name, "amplitude")
        bars = figure.add_subplot(grid[number, 7])
        draw_shares(bars, before, after)
        if number == 0:
            bars.legend(fontsize=FONT - 1, frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 0.97))
    bars.set_xlabel("orientation of the band", fontsize=FONT, labelpad=1)
    return figure


def draw_shares(axes: Axes, before: Tensor, after: Tensor) -> None:
    """Bars: each orientation's part of the energy, in per cent."""
    positions = np.arange(len(ORIENTATIONS))
    styles = ((-0.2, before, "before blending", "0.65"), (0.2, after, "after", "#b5367a"))
    for offset, energy, label, colour in styles:
        share = 100 * energy.sum((1, 2)) / energy.sum().clamp_min(1e-30)
        axes.bar(positions + offset, share.numpy(), 0.38, label=label, color=colour)
    axes.set_xticks(positions, ORIENTATIONS)
    axes.set_ylabel("% of the energy", fontsize=FONT)
    axes.tick_params(labelsize=FONT - 1, length=2)
    axes.yaxis.set_major_locator(MaxNLocator(3))
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    run_cli(main)
