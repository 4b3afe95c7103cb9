"""Draw the learned filters of the spectral and scattering layers of a checkpoint, as in the papers.

For spectral gates: the magnitude of the full frequency response, zero frequency in the centre (gates_magnitude), and
the equivalent convolution kernels, origin in the centre (gates_kernels). For scattering layers: the low-pass weights
(scattering_low_pass), and the amplitude of the six oriented bands of one image after blending
(scattering_orientations).
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.fft import fft2, fftshift

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

Panels = dict[str, Tensor]  # the planes (h, w) of a layer by their titles


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
    make_directory(args.output)
    panels, save = partial(channel_panels, count=args.channels), partial(save_rows, args, info.arch)
    if gates:
        kernels = {name: spatial_kernels(gate) for name, gate in gates.items()}
        rows = {name: panels(fftshift(fft2(planes).abs(), dim=(1, 2))) for name, planes in kernels.items()}
        save("gates_magnitude", "magnitude of the spectral gates, up to half a cycle per token", rows)
        rows = {name: panels(fftshift(planes, dim=(1, 2)), signed=True) for name, planes in kernels.items()}
        save("gates_kernels", "spatial kernels of the spectral gates", rows)
    if mixers:
        low_pass = {name: mixer.low_pass.detach().permute(2, 0, 1) for name, mixer in mixers.items()}
        rows = {name: panels(weights, signed=True) for name, weights in low_pass.items()}
        save("scattering_low_pass", "low-pass weights", rows)
        photograph = Image.fromarray(load_sample_image("china.jpg"))
        image = info.transform(photograph if args.image is None else read_image(args.image, upright=True))
        rows = band_panels(info.model, mixers, image[None])
        save("scattering_orientations", "amplitude of the image's oriented bands after blending", rows)


def layers(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """Return the mixers of a type, by name."""
    return {name.removesuffix(".mixer"): part for name, part in model.named_modules() if isinstance(part, kind)}


def spatial_kernels(gate: SpectralGate) -> Tensor:
    """Return the real kernels (C, H, W) of a gate's circular convolution, origin first.

    Their Fourier transform is the full frequency response, of which the gate stores half. `irfft2` discards the part of
    columns 0 and W / 2 that would make the kernels complex.
    """
    weight = torch.view_as_complex(gate.complex_weight.detach().double().contiguous())
    return torch.fft.irfft2(weight, s=gate.grid_size, dim=(0, 1)).permute(2, 0, 1)


@torch.no_grad()
def band_panels(model: nn.Module, mixers: dict[str, ScatteringMixer], images: Tensor) -> dict[str, Panels]:
    """Return the amplitudes of each mixer's oriented bands after blending, for images (B, 3, H, W).

    They are roots of |z|^2, summed over channels and averaged over images. The blended response to zeros, which comes
    from the biases and is the same for all images and orientations, is subtracted first.
    """
    inputs: list[Tensor] = []  # the bands before blending
    first_blends = [mixer.get_submodule(MIXINGS[mixer.mixing][0]) for mixer in mixers.values()]
    hooks = [blend.register_forward_pre_hook(lambda _, bands: inputs.append(*bands)) for blend in first_blends]
    model(images)
    for hook in hooks:
        hook.remove()
    rows: dict[str, Panels] = {}
    for (name, mixer), bands in zip(mixers.items(), inputs, strict=True):
        blend = nn.Sequential(*[mixer.get_submodule(part) for part in MIXINGS[mixer.mixing]])
        blended = blend(bands) - blend(torch.zeros_like(bands[:1]))
        amplitudes = blended.double().square().sum((-2, -1)).mean(0).sqrt().permute(2, 0, 1)
        rows[name] = dict(zip(ORIENTATIONS, amplitudes, strict=True))
    return rows


def channel_panels(planes: Tensor, count: int, signed: bool = False) -> Panels:
    """Return the mean over channels (of magnitudes if signed) and `count` evenly spaced channels of (C, h, w)."""
    channels = np.unique(np.linspace(0, len(planes) - 1, count).round().astype(int))
    chosen = {f"channel {channel}": planes[channel] for channel in channels.tolist()}
    return {"mean of |·|" if signed else "mean": planes.abs().mean(0)} | chosen


def save_rows(args: argparse.Namespace, arch: str, name: str, title: str, rows: dict[str, Panels]) -> None:
    """Save a figure with a row for each layer and one colour scale per row, symmetric if any value is negative."""
    columns = max(map(len, rows.values()))
    size = (columns * PANEL + 1.5, len(rows) * (PANEL + 0.17) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(as_label(f"{arch}: {title}", 100), fontsize=FONT + 2)
    for row, (layer, planes) in zip(figure.subplots(len(rows), columns, squeeze=False), rows.items(), strict=True):
        values = torch.stack(list(planes.values())).numpy()
        limit = float(np.quantile(np.abs(values), 0.999)) or 1.0
        style = {"cmap": "RdBu_r", "vmin": -limit} if values.min() < 0 else {"cmap": "magma", "vmin": 0.0}
        for axes, label, plane in zip(row, planes, values, strict=False):
            drawn = axes.imshow(plane, vmax=limit, **style)
            axes.set_title(label, fontsize=FONT, pad=2)
        for axes in row:
            axes.set(xticks=[], yticks=[], frame_on=False)
        row[0].set_ylabel(layer, fontsize=FONT, rotation=0, ha="right", va="center")
        bar = figure.colorbar(drawn, ax=list(row), fraction=0.02, pad=0.01, aspect=14)
        bar.ax.tick_params(labelsize=FONT - 1, length=2)
    path = args.output / f"{name}.{args.format}"
    save_figure(path, figure)
    print(path)


if __name__ == "__main__":
    run_cli(main)
