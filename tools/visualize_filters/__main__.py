"""Draw what the spectral and scattering layers of a checkpoint have learned, as the papers' figures do.

Spectral gates: the magnitude of their frequency response over the whole plane, zero frequency in the centre
(gates_magnitude), and the kernels with which they convolve (gates_kernels). Scattering layers: the low-pass
weights (scattering_low_pass), the weights that blend the bands (scattering_blending), and the energy of the
six oriented bands of one image before and after it (scattering_orientations). That energy depends on the
image: Einstein blending has the same weights for all orientations.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_transform
from torch import nn

from inference.explanations import displayable
from inference.output_files import save_figure
from inputs.images import read_image
from models import LoadedModel, load_checkpoint
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate
from runtime.entry_point import run_cli
from tools.command_line import ToolParser
from training.arguments import COUNT, POSITIVE
from utils import UserError, make_directory

from .drawing import draw_blending, draw_orientations, draw_planes, frequency_axes, position_axes, token_axes
from .responses import orientation_energies, spatial_kernels, transfer_functions


def layer_name(path: str) -> str:
    r"""``stages.0.blocks.2.mixer`` -> "stage 1\nblock 3"; ``blocks.2.mixer`` -> "block 3"."""
    parts = path.split(".")
    kinds = {"stages": "stage", "blocks": "block"}
    return "\n".join(
        f"{kinds[word]} {int(number) + 1}" for word, number in zip(parts, parts[1:], strict=False) if word in kinds
    )


def layers(model: nn.Module, kind: type) -> dict[str, nn.Module]:
    """The mixers of a kind, by the name to write beside them."""
    return {layer_name(path): module for path, module in model.named_modules() if isinstance(module, kind)}


def gate_figures(gates: dict[str, SpectralGate], info: LoadedModel, channels: Sequence[int]) -> dict[str, Figure]:
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
    info: LoadedModel,
    channels: Sequence[int],
    picture: Image.Image,
) -> dict[str, Figure]:
    transform = create_transform(
        info.input_size,
        mean=info.mean,
        std=info.std,
        crop_pct=info.crop_pct,
        interpolation=info.interpolation,
    )
    image = transform(picture)
    energies = dict(zip(mixers, orientation_energies(model, list(mixers.values()), image[None]), strict=True))
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
            mixers, f"{info.arch}: blending of the bands, |W|; matrices from input (down) to output (across)"
        ),
        "scattering_orientations": draw_orientations(
            displayable(image, info).numpy(), energies, f"{info.arch}: oriented bands of an image after blending"
        ),
    }


def channel_list(text: str) -> list[int]:
    """``"8"`` -> [8]; ``"0,5,9"`` -> [0, 5, 9]."""
    return [(COUNT if "," in text else POSITIVE)(word) for word in text.split(",")]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ToolParser("visualize_filters", __doc__)
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
        metavar="FILE",
        help="the image whose oriented bands are drawn (default: a photograph of scikit-learn's)",
    )
    parser.add_argument("--format", choices=["png", "pdf", "svg"], default="png", help="of the figures (default: png)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    info = load_checkpoint(args.checkpoint, args.arch, ema=args.ema)
    model = info.model
    gates, mixers = layers(model, SpectralGate), layers(model, ScatteringMixer)
    if not gates and not mixers:
        raise UserError(f"{args.checkpoint}: {info.arch} has neither spectral gates nor scattering layers")
    figures = gate_figures(gates, info, args.channels) if gates else {}
    if mixers:
        photograph = Image.fromarray(load_sample_image("china.jpg"))
        picture = photograph if args.image is None else read_image(args.image, upright=True)
        figures |= scattering_figures(model, mixers, info, args.channels, picture)
    make_directory(args.output)
    for name, figure in figures.items():
        save_figure(args.output / f"{name}.{args.format}", figure)
        print(args.output / f"{name}.{args.format}")


if __name__ == "__main__":
    run_cli(main)
