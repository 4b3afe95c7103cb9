"""Mixers from other papers: FNet, FNO and AFNO, which use the Fourier transform, and convolution and pooling."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blending import EinsteinBlending, real_bias, real_matrix
from .precision import autocast_off, full_precision
from .resampling import Grid


@torch.fx.wrap
def spectrum(x: Tensor) -> Tensor:
    """Compute the FFT of a (B, H, W, C) grid as (B, H, W // 2 + 1, 2, C), real part first, in float32 or float64."""
    with autocast_off(x):
        frequencies = torch.fft.rfft2(full_precision(x), dim=(1, 2), norm="ortho")
        return torch.stack((frequencies.real, frequencies.imag), -2)


@torch.fx.wrap
def from_spectrum(parts: Tensor, grid: Grid) -> Tensor:
    """Invert `spectrum`: return the (B, H, W, C) grid."""
    with autocast_off(parts):
        return torch.fft.irfft2(torch.complex(*parts.unbind(-2)), s=grid, dim=(1, 2), norm="ortho")


@torch.fx.wrap
def complex_linear(parts: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Multiply (..., 2, C) by a complex weight (2, C, C) and add a bias (2, C); the real part is always first."""
    weight, bias = real_matrix(weight.to(parts.dtype)), real_bias(bias.to(parts.dtype))
    with autocast_off(parts):
        return F.linear(parts.flatten(-2), weight.mT, bias).view(parts.shape)


@torch.fx.wrap
def real_spectrum(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """Compute the real part of the FFT over the given axes."""
    with autocast_off(x):
        return torch.fft.fftn(full_precision(x), dim=axes, norm="ortho").real.to(x.dtype)


class FNet(nn.Module):
    """The real part of the FFT over the (B, H, W, C) grid, without weights (https://arxiv.org/abs/2105.03824).

    `channels` adds an FFT along the channels, as in that paper. The transform is orthonormal, so it preserves the
    magnitude of its input.
    """

    def __init__(self, channels: bool = False):
        super().__init__()
        self.axes = (1, 2, 3) if channels else (1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return real_spectrum(x, self.axes)


class FourierOperator(nn.Module):
    """FFT, a complex linear layer shared by all frequencies, inverse FFT: "FNO" in the SVT paper's table."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(2, dim, dim))
        self.bias = nn.Parameter(0.02 * torch.randn(2, dim))

    def forward(self, x: Tensor) -> Tensor:
        return from_spectrum(complex_linear(spectrum(x), self.weight, self.bias), x.shape[1:3]).to(x.dtype)


class AFNO(nn.Module):
    """Adaptive Fourier neural operator (https://arxiv.org/abs/2111.13587).

    FFT, two complex layers on blocks of channels, soft shrinkage, inverse FFT and a residual connection.

    Raises:
        ValueError: if the number of channels is not a multiple of `blocks`.
    """

    def __init__(self, dim: int, blocks: int = 8, shrinkage: float = 0.01):
        super().__init__()
        if dim % blocks:
            raise ValueError(f"AFNO needs a multiple of {blocks} channels, not {dim}")
        self.shrinkage = shrinkage
        self.mlp = EinsteinBlending(blocks, dim // blocks, "channels")

    def forward(self, x: Tensor) -> Tensor:
        parts = F.softshrink(self.mlp(spectrum(x)), self.shrinkage)
        return x + from_spectrum(parts, x.shape[1:3]).to(x.dtype)


class DepthwiseConv(nn.Module):
    """Depthwise convolution over the (B, H, W, C) grid."""

    def __init__(self, dim: int, kernel_size: int = 3):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding="same", groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class AveragePooling(nn.Module):
    """The mean of 3x3 tokens minus the token itself: PoolFormer's mixer (https://arxiv.org/abs/2111.11418)."""

    def forward(self, x: Tensor) -> Tensor:
        mean = F.avg_pool2d(x.permute(0, 3, 1, 2), 3, stride=1, padding=1, count_include_pad=False)
        return mean.permute(0, 2, 3, 1) - x
