"""The mixers and the wavelet transform alone."""

import copy
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from models import reference, set_spectral_precision
from models.mixers import build_mixer
from models.wavelet import DTCWT
from tools.export.portable import FourierProducts

from .settings import Settings
from .stopwatch import speed_ratio, take_turns
from .tables import layer_line

LAYER_GRIDS = (7, 14, 28, 32, 56, 64, 112, 128)


def training_run(layer: nn.Module, x: Tensor, settings: Settings, *args: object) -> Callable[[], None]:
    """Forward and backward of one layer."""
    call = torch.compile(layer) if settings.compile else layer
    x = x.requires_grad_()
    with torch.no_grad(), settings.autocast():
        gradient = torch.randn_like(call(x, *args))

    def run() -> None:
        with settings.autocast():
            y = call(x, *args)
        y.backward(gradient)
        x.grad = None
        layer.zero_grad()

    return run


def inference_run(layer: nn.Module, x: Tensor, settings: Settings, *args: object) -> Callable[[], None]:
    call = torch.compile(layer) if settings.compile else layer

    def run() -> None:
        with torch.inference_mode(), settings.autocast():
            call(x, *args)

    return run


class WaveletPair(nn.Module):
    """Wavelet transform and inverse of a (B, H, W, C) grid."""

    def __init__(self, side: int):
        super().__init__()
        self.wavelet = DTCWT((side, side))

    def forward(self, x: Tensor) -> Tensor:
        return self.wavelet.inverse(*self.wavelet(x), (x.shape[1], x.shape[2]))


class LibraryWaveletPair(nn.Module):
    """The same on (B, C, H, W), by pytorch_wavelets."""

    def __init__(self):
        super().__init__()
        from pytorch_wavelets import DTCWTForward, DTCWTInverse

        self.xfm = DTCWTForward(J=1, biort="near_sym_b", qshift="qshift_b")
        self.ifm = DTCWTInverse(biort="near_sym_b", qshift="qshift_b")

    def forward(self, x: Tensor) -> Tensor:
        return self.ifm(self.xfm(x))


def layer_pairs(side: int, dim: int, x: Tensor) -> Iterator[tuple[str, tuple, tuple]]:
    """For each operation its name, our layer and the plain one, each with the arguments of its call."""
    grid, tokens = (side, side), x.flatten(1, 2)
    heads = dim // 32
    gate = build_mixer("spectral", dim, grid, heads)
    yield "spectral", (gate, x), (reference.SpectralGate(dim, grid), tokens, grid)
    for mixing in ("channel", "channel_token"):
        ours = build_mixer(f"scattering_{mixing}", dim, grid, heads)
        yield f"scattering_{mixing}", (ours, x), (reference.Scattering(dim, grid, mixing), tokens, grid)
    yield "wavelet", (WaveletPair(side), x), (LibraryWaveletPair(), x.permute(0, 3, 1, 2).contiguous())
    if x.shape[0] * heads * side**4 * 4 <= 2**31:  # the plain attention's matrix stays below 2 GiB
        attention = build_mixer("attention", dim, grid, heads)
        yield "attention", (attention, x), (reference.Attention(dim, heads), tokens, grid)


def precision_pairs(side: int, dim: int, x: Tensor) -> Iterator[tuple[str, tuple, tuple]]:
    """Ways to compute the spectral mixers under autocast, as `layer_pairs`: each beside float32 throughout."""
    grid = (side, side)
    for name in ("spectral", "scattering_channel", "scattering_channel_token"):
        half = build_mixer(name, dim, grid, 1)
        exact = copy.deepcopy(half)
        set_spectral_precision(exact, "float32")
        yield name, (half, x), (exact, x)
        if name == "spectral":
            yield "spectral_products", (FourierProducts(exact, dynamic=False), x), (exact, x)


def compare_layers(
    grids: Sequence[int], dim: int, settings: Settings, rounds: int, pairs: Callable[..., Iterator]
) -> dict:
    """The pairs of layers on square grids; larger batches for smaller grids."""
    rows = []
    for side in grids:
        batch = max(1, settings.batch_size * 56**2 // max(side, 28) ** 2)
        x = torch.randn(batch, side, side, dim, device=settings.device)
        for name, *pair in pairs(side, dim, x):
            row = {"layer": name, "grid": side, "batch": batch, "channels": dim}
            for part, make in (("training", training_run), ("inference", inference_run)):
                runs = {
                    who: make(layer.to(settings.device), data.clone(), settings, *args)
                    for who, (layer, data, *args) in zip(("ours", "plain"), pair, strict=True)
                }
                seconds = take_turns(runs, rounds, settings.device)
                row |= {f"{part}_{who}_ms": 1000 * statistics.median(seconds[who]) for who in runs}
                row[f"{part}_ratio"] = speed_ratio(seconds, "ours", "plain")
            rows.append(row)
            print(layer_line(row), flush=True)
    return {"settings": asdict(settings), "rounds": rounds, "layers": rows}
