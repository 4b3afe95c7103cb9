"""Mixers of other papers that work on the Fourier transform of the token grid: FNet, Fourier operator, AFNO."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Grid, autocast_off, full_precision
from .scattering import EinsteinBlending, real_bias, real_matrix


@torch.fx.wrap
def spectrum(x: Tensor) -> Tensor:
    """FFT over the (B, H, W, C) grid, real and imaginary part (2, B, H, W // 2 + 1, C), in float32 or float64."""
    with autocast_off(x):
        frequencies = torch.fft.rfft2(full_precision(x), dim=(1, 2), norm="ortho")
        return torch.stack((frequencies.real, frequencies.imag))


@torch.fx.wrap
def from_spectrum(planes: Tensor, grid: Grid) -> Tensor:
    """The (B, H, W, C) grid of a `spectrum`."""
    with autocast_off(planes):
        return torch.fft.irfft2(torch.complex(*planes), s=grid, dim=(1, 2), norm="ortho")


@torch.fx.wrap
def complex_linear(planes: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(2, ..., C) times the complex (2, C, C) plus (2, C), real part first throughout."""
    weight, bias = weight.to(planes.dtype), bias.to(planes.dtype)
    with autocast_off(planes):
        x = F.linear(torch.cat(planes.unbind(), -1), real_matrix(weight).mT, real_bias(bias))
        return torch.stack(x.chunk(2, -1))


@torch.fx.wrap
def real_spectrum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Real part of the FFT over some axes."""
    with autocast_off(x):
        return torch.fft.fftn(full_precision(x), dim=axes, norm="ortho").real.to(x.dtype)


class FNet(nn.Module):
    """The real part of the FFT over the (B, H, W, C) grid, without weights (https://arxiv.org/abs/2105.03824).

    With `channels` it is transformed along the channels too, as in that paper. Orthonormal, so that it keeps the
    size of what it transforms.
    """

    def __init__(self, channels: bool = False):
        super().__init__()
        self.axes = (1, 2, 3) if channels else (1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return real_spectrum(x, self.axes)


class FourierOperator(nn.Module):
    """FFT, one complex linear layer for all frequencies, inverse FFT: FNO in the table of SVT's paper."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(2, dim, dim))
        self.bias = nn.Parameter(0.02 * torch.randn(2, dim))

    def forward(self, x: Tensor) -> Tensor:
        return from_spectrum(complex_linear(spectrum(x), self.weight, self.bias), x.shape[1:3]).to(x.dtype)


class AFNO(nn.Module):
    """FFT, two complex layers in blocks of channels, soft shrinkage, inverse FFT, and the input added.

    Adaptive Fourier neural operator (https://arxiv.org/abs/2111.13587).

    Raises:
        ValueError: the channels make no whole blocks.
    """

    def __init__(self, dim: int, blocks: int = 8, shrinkage: float = 0.01):
        super().__init__()
        if dim % blocks:
            raise ValueError(f"AFNO takes a multiple of {blocks} channels, not {dim}")
        self.shrinkage = shrinkage
        self.mlp = EinsteinBlending(blocks, dim // blocks, "channels")

    def forward(self, x: Tensor) -> Tensor:
        planes = F.softshrink(self.mlp(spectrum(x)), self.shrinkage)
        return x + from_spectrum(planes, x.shape[1:3]).to(x.dtype)
