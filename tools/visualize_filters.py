"""Draw the learned filters of the spectral and scattering layers of a checkpoint, as in the papers.

For spectral gates: the magnitude of the full frequency response, zero frequency in the centre (gates_magnitude), and
the equivalent convolution kernels, origin in the centre (gates_kernels). For scattering layers: the low-pass weights
(scattering_low_pass), and the amplitude of the six oriented bands of one image after blending
(scattering_orientations), with each band's share of the energy before and after. These shares depend on the image,
because Einstein blending uses the same weights for all orientations.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.fft import fft2, fftshift

from inference.explanations import displayable
from inference.output_files import as_label, save_figure
from inputs.images import read_image
from models import load_checkpoint
from models.scattering import MIXINGS, ScatteringMixer
from models.spectral_gate import SpectralGate
from runtime.cli import run_cli
from training.arguments import POSITIVE, Parser
from utils import UserError, make_directory

ORIENTATIONS = ("15°", "45°", "75°", "105°", "135°", "165°")
PANEL = 0.95  # inches
FONT = 7

Panels = dict[str, np.ndarray]  # the planes (h, w) of a layer by their titles; an image is (h, w, 3)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.visualize_filters")
    add = parser.add_argument
    add("checkpoint", help="checkpoint, run directory (its best checkpoint), or name of a bundled model")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the figures")
    add("--arch", metavar="NAME", help="model name, if the checkpoint does not contain it")
    averaged = "use the averaged weights (default: if the checkpoint has them)"
    add("--ema", action=argparse.BooleanOptionalAction, default=None, help=averaged)
    add("--channels", type=POSITIVE, default=8, metavar="N", help="number of evenly spaced channels to draw")
    image = "image for the oriented bands (default: a photograph from scikit-learn)"
    add("--image", type=Path, metavar="FILE", help=image)
    add("--format", choices=["png", "pdf", "svg"], default="png", help="format of the figures")
    args = parser.parse_args(argv)

    info = load_checkpoint(args.checkpoint, args.arch, ema=args.ema)
    gates, mixers = layers(info.model, SpectralGate), layers(info.model, ScatteringMixer)
    if not gates and not mixers:
        raise UserError(f"{args.checkpoint}: {info.arch} has neither spectral gates nor scattering layers")
    panels = partial(channel_panels, count=args.channels)
    figures: dict[str, tuple[str, dict[str, Panels]]] = {}  # file name -> title, and a row of panels for each layer
    if gates:
        kernels = {name: spatial_kernels(gate) for name, gate in gates.items()}
        figures["gates_magnitude"] = (
            "magnitude of the spectral gates, up to half a cycle per token",
            {name: panels(fftshift(fft2(planes).abs(), dim=(1, 2))) for name, planes in kernels.items()},
        )
        figures["gates_kernels"] = (
            "spatial kernels of the spectral gates",
            {name: panels(fftshift(planes, dim=(1, 2)), signed=True) for name, planes in kernels.items()},
        )
    if mixers:
        figures["scattering_low_pass"] = (
            "low-pass weights",
            {name: panels(mixer.low_pass.detach().permute(2, 0, 1), signed=True) for name, mixer in mixers.items()},
        )
        photograph = Image.fromarray(load_sample_image("china.jpg"))
        image = info.transform(photograph if args.image is None else read_image(args.image, upright=True))
        energies = orientation_energies(info.model, list(mixers.values()), image[None])
        shown = {"the image": displayable(image, info).numpy()}
        title = "amplitude of oriented bands after blending; % of the energy before and after"
        figures["scattering_orientations"] = (
            title,
            {name: shown | band_panels(*pair) for name, pair in zip(mixers, energies, strict=True)},
        )
    make_directory(args.output)
    for name, (title, rows) in figures.items():
        save_figure(args.output / f"{name}.{args.format}", draw(rows, f"{info.arch}: {title}"))
        print(args.output / f"{name}.{args.format}")


def layers(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    r"""Return the mixers of a type, by "stage 1\nblock 3" (pyramids) or "block 3"."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    return {
        "\n".join(f"{word} {int(number) + 1}" for word, number in re.findall(r"(\w+)s\.(\d+)", name)): module
        for name, module in found.items()
    }


# ---------------------------------------------------------------------------------------------------------- responses


def spatial_kernels(gate: SpectralGate) -> Tensor:
    """Return the real kernels (C, H, W) of a gate's circular convolution, origin first.

    Their Fourier transform is the full frequency response, of which the gate stores half. `irfft2` discards the part of
    columns 0 and W / 2 that would make the kernels complex.
    """
    weight = torch.view_as_complex(gate.complex_weight.detach().double().contiguous())
    return torch.fft.irfft2(weight, s=gate.grid_size, dim=(0, 1)).permute(2, 0, 1)


@torch.no_grad()
def orientation_energies(
    model: nn.Module, mixers: Sequence[ScatteringMixer], images: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return the energy of each mixer's oriented bands before and after blending, for images (B, 3, H, W).

    Each energy is (6, h, w): |z|^2 summed over channels and averaged over images. The blended response to zeros, which
    comes from the biases and is the same for all images and orientations, is subtracted first.
    """
    inputs: list[Tensor] = []  # the bands before blending
    first_blends = [mixer.get_submodule(MIXINGS[mixer.mixing][0]) for mixer in mixers]
    hooks = [blend.register_forward_pre_hook(lambda _, bands: inputs.append(*bands)) for blend in first_blends]
    model(images)
    for hook in hooks:
        hook.remove()
    energies = []
    for mixer, bands in zip(mixers, inputs, strict=True):
        blend = nn.Sequential(*[mixer.get_submodule(name) for name in MIXINGS[mixer.mixing]])
        blended = blend(bands) - blend(torch.zeros_like(bands[:1]))
        both = [band.double().square().sum((-2, -1)).mean(0).permute(2, 0, 1) for band in (bands, blended)]
        energies.append(tuple(both))
    return energies


# ------------------------------------------------------------------------------------------------------------ figures


def channel_panels(planes: Tensor, count: int, signed: bool = False) -> Panels:
    """Return the mean over channels (of magnitudes if signed) and `count` evenly spaced channels of (C, h, w)."""
    channels = np.unique(np.linspace(0, len(planes) - 1, count).round().astype(int))
    chosen = {f"channel {channel}": planes[channel].numpy() for channel in channels.tolist()}
    return {"mean of |·|" if signed else "mean": planes.abs().mean(0).numpy()} | chosen


def band_panels(before: Tensor, after: Tensor) -> Panels:
    """Return the amplitudes of the bands after blending, by titles with their shares of the energies (6, h, w)."""
    shares = (100 * energy.sum((1, 2)) / energy.sum().clamp_min(1e-30) for energy in (before, after))
    return {
        f"{angle}: {old:.0f} → {new:.0f} %": plane.numpy()
        for angle, old, new, plane in zip(ORIENTATIONS, *shares, after.sqrt(), strict=True)
    }


def draw(layers: dict[str, Panels], title: str) -> Figure:
    """Draw a row for each layer, with one colour scale per row, symmetric if any value is negative."""
    columns = max(map(len, layers.values()))
    size = (columns * PANEL + 1.5, len(layers) * (PANEL + 0.17) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(as_label(title, 100), fontsize=FONT + 2)
    for row, (name, planes) in zip(figure.subplots(len(layers), columns, squeeze=False), layers.items(), strict=True):
        signed = any(plane.min() < 0 for plane in planes.values())
        # Images do not share the row's scale. In signed rows, neither does the mean of magnitudes.
        scaled = [plane for plane in list(planes.values())[int(signed) :] if plane.ndim == 2]
        limit = float(np.quantile(np.abs(np.stack(scaled)), 0.999)) or 1.0
        style = {"cmap": "RdBu_r", "vmin": -limit} if signed else {"cmap": "magma", "vmin": 0.0}
        for axes, (label, plane) in zip(row, planes.items(), strict=False):
            drawn = axes.imshow(plane, vmax=limit, **style)
            axes.set_title(label, fontsize=FONT, pad=2)
        for axes in row:
            axes.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(name, fontsize=FONT + 1, rotation=0, ha="right", va="center")
        bar = figure.colorbar(drawn, ax=list(row), fraction=0.02, pad=0.01, aspect=14)
        bar.locator = MaxNLocator(3)
        bar.ax.tick_params(labelsize=FONT - 1, length=2)
    return figure


if __name__ == "__main__":
    run_cli(main)
