"""The spectral gating network (SpectFormer, section 3; introduced by GFNet)."""

import math

import torch
from torch import Tensor, nn

from .cpu.kernels import is_exporting, may_run
from .cpu.spectral_product import product_in_slices
from .layers import GridMixer
from .matrices import builder, matrix, multiply
from .precision import autocast_off, full_precision
from .resampling import Grid, resize_grid

# Above this many rows or columns, the FFT is faster than half-precision matrix products.
LARGEST_SIDE = 200
# Up to this many rows and columns, one matrix transforms both axes: more arithmetic, less memory traffic.
LARGEST_DENSE = 14


class SpectralGate(GridMixer):
    """A learned filter over the token grid: FFT, multiplication by a complex weight, inverse FFT.

    Maps (B, H, W, C) to (B, H, W, C). The last axis of `complex_weight` (H, W // 2 + 1, C, 2) is real and imaginary
    part. It is resampled for a grid other than `grid_size`. `spectral_precision` sets the precision under autocast.
    """

    def __init__(self, dim: int, grid_size: Grid):
        super().__init__()
        self.grid_size = grid_size
        height, width = grid_size
        self.complex_weight = nn.Parameter(0.02 * torch.randn(height, width // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        y = gate(self.spectral_input(x), resize_filter(self.complex_weight, x.shape[1:3]))
        return y if self.spectral_precision == "half" else y.to(x.dtype)

    @staticmethod
    def resize_weight(name: str, weight: Tensor, grid: Grid) -> Tensor:
        """See `resize_filter`."""
        return resize_filter(weight, grid) if name == "complex_weight" else weight


@torch.fx.wrap
def gate(x: Tensor, complex_weight: Tensor) -> Tensor:
    """Apply an FFT over the (B, H, W, C) grid, the weight (H, W // 2 + 1, C, 2) and the inverse FFT in x's dtype.

    Most devices have no half-precision FFT, and a float32 FFT moves three times as much memory as half-precision
    products with small Fourier matrices. Exported programs also use products, because few runtimes have an FFT.
    """
    with autocast_off(x):
        half = x.dtype in (torch.float16, torch.bfloat16)
        if is_exporting() or (half and max(x.shape[1:3]) <= LARGEST_SIDE):
            return gate_by_products(x, complex_weight)
        signal = full_precision(x)
        spectrum = torch.fft.rfft2(signal, dim=(1, 2), norm="ortho")
        # Converting a model to channels_last permutes its four-dimensional weights.
        spectrum = spectrum * torch.view_as_complex(complex_weight.to(signal.dtype).contiguous())
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho").to(x.dtype)


def gate_by_products(x: Tensor, complex_weight: Tensor) -> Tensor:
    """`gate` by real matrix products. The backward pass only keeps the spectrum (B, 2, H, F, C), F = W // 2 + 1."""
    batch, height, width, channels = x.shape
    sliced = may_run(x, (complex_weight,))
    # On a CPU, arithmetic costs more than memory traffic. Exported programs may have dynamic sizes.
    dense = not sliced and not is_exporting() and max(height, width) <= LARGEST_DENSE
    if dense:
        spectrum = multiply(matrix(dense_transform, height, width, like=x), x.flatten(1, 2))
    else:
        rows = multiply(matrix(width_transform, width, like=x), x.flatten(0, 1))
        spectrum = multiply(matrix(height_transform, height, like=x), rows.view(batch, 2 * height, -1))
    spectrum = spectrum.view(batch, 2, height, -1, channels)
    if sliced:
        parts, inverse = product_in_slices([spectrum, complex_weight]), matrix(height_transform, height, like=x).T
    else:
        # The four products of real and imaginary parts, (out, in, H, F, C). The next matrix product sums them.
        real, imaginary = complex_weight.to(x.dtype).unbind(-1)
        weight = torch.stack((real, -imaginary, imaginary, real)).unflatten(0, (2, 2))
        parts, inverse = weight * spectrum[:, None], matrix(height_inverse, height, like=x)
    if dense:
        return multiply(matrix(dense_inverse, height, width, like=x), parts.flatten(1, 4)).view(x.shape)
    rows = multiply(inverse, parts.view(batch, inverse.shape[1], -1))
    return multiply(matrix(width_inverse, width, like=x), rows.view(batch * height, -1, channels)).view(x.shape)


# Orthonormal transforms of a real (H, W) grid as float64 matrices. The width transform gives (H, 2, F) numbers, the
# real and imaginary part of each row's frequencies; the height transform gives the spectrum (2, H, F).


@builder
def width_transform(width: int) -> Tensor:
    """(2F, W) matrix from a row to the real parts, then the imaginary parts of its frequencies."""
    cosine, sine = _waves(torch.arange(width // 2 + 1), width)
    return torch.cat((cosine, -sine))


@builder
def width_inverse(width: int) -> Tensor:
    """(W, 2F) matrix, the inverse of `width_transform`. Like `irfft`, it implies the other half of the spectrum."""
    frequencies = torch.arange(width // 2 + 1)
    cosine, sine = _waves(frequencies, width)
    # Each frequency also counts for its mirror image, except the first and, for an even width, the last.
    times = torch.where((frequencies == 0) | (2 * frequencies == width), 1.0, 2.0)
    return torch.cat((cosine.T * times, -sine.T * times), 1)


@builder
def height_transform(height: int) -> Tensor:
    """(2H, 2H) matrix from the (H, 2) complex numbers of a column to its (2, H) frequencies."""
    cosine, sine = _waves(torch.arange(height), height)
    real, imaginary = torch.stack((cosine, sine), 2), torch.stack((-sine, cosine), 2)
    return torch.cat((real.flatten(1), imaginary.flatten(1)))


@builder
def height_inverse(height: int) -> Tensor:
    """(2H, 4H) matrix from a column's (2, 2, H) frequencies, each part as two addends, to (H, 2) complex numbers."""
    transposed = height_transform(height).T
    real, imaginary = transposed[:, :height], transposed[:, height:]
    return torch.cat((real, real, imaginary, imaginary), 1)


@builder
def dense_transform(height: int, width: int) -> Tensor:
    """(2HF, HW) matrix that transforms both axes."""
    rows, columns = height_transform(height).view(2 * height, height, 2), width_transform(width).view(2, -1, width)
    return torch.einsum("khp,pfw->kfhw", rows, columns).flatten(2).flatten(0, 1)


@builder
def dense_inverse(height: int, width: int) -> Tensor:
    """(HW, 4HF) matrix that inverts both axes, from addends as in `height_inverse`."""
    rows, columns = height_inverse(height).view(height, 2, 4 * height), width_inverse(width).view(width, 2, -1)
    return torch.einsum("hpk,wpf->hwkf", rows, columns).flatten(2).flatten(0, 1)


def _waves(frequencies: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return (frequencies, size) cosines and sines; each row of both together has norm 1.

    It computes with tensors only, because Python arithmetic would fix a size that is dynamic in an export.
    """
    turns = (frequencies[:, None] * torch.arange(size) % size).double() / size
    length = torch.full((), size, dtype=torch.float64).sqrt()
    return (2 * math.pi * turns).cos() / length, (2 * math.pi * turns).sin() / length


@torch.fx.wrap
def resize_filter(complex_weight: Tensor, grid: Grid) -> Tensor:
    """Resample a gate's weight to the grid (H, W), by the authors' rule for fine-tuning at another resolution.

    It treats the weight as an image of (H, W // 2 + 1) pixels and 2C channels: bicubic, align_corners=True.
    """
    size = (grid[0], grid[1] // 2 + 1)
    if complex_weight.shape[:2] == size:
        return complex_weight
    resized = resize_grid(complex_weight.flatten(2), size, align_corners=True)
    return resized.unflatten(2, complex_weight.shape[2:])
