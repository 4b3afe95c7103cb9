"""The spectral gating network (SpectFormer, section 3; introduced by GFNet)."""

import math

import torch
from torch import Tensor, nn

from .cpu import is_exporting, may_run
from .layers import GridMixer
from .matrices import builder, matrix, multiply
from .precision import autocast_off, full_precision
from .resampling import Grid, resize_grid

# Rows or columns beyond which the FFT is faster than products in half precision.
LARGEST_SIDE = 200
# Rows or columns up to which one matrix transforms both axes at once: more arithmetic, less memory traffic.
LARGEST_DENSE = 14


class SpectralGate(GridMixer):
    """A learned filter over the token grid: FFT, times a complex weight, inverse FFT.

    (B, H, W, C) to (B, H, W, C). `complex_weight` is (H, W // 2 + 1, C, 2), real and imaginary part last; for a grid
    other than `grid_size` it is resampled. Computed in the precision that `spectral_precision` says.
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
    def resize_weights(weights: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """See `resize_filter`."""
        weight = weights.get("complex_weight")
        if weight is None or weight.ndim != 4:
            return weights
        return weights | {"complex_weight": resize_filter(weight, grid)}


@torch.fx.wrap
def gate(x: Tensor, complex_weight: Tensor) -> Tensor:
    """FFT over the (B, H, W, C) grid, times (H, W // 2 + 1, C, 2), inverse FFT, in the dtype of x.

    There is no FFT in half precision on most devices, and one in float32 moves three times as much memory as products
    with small Fourier matrices do in half precision. Exported programs have products too: few runtimes have an FFT.
    """
    with autocast_off(x):
        half = x.dtype in (torch.float16, torch.bfloat16)
        if is_exporting() or (half and max(x.shape[1:3]) <= LARGEST_SIDE):
            return gate_by_products(x, complex_weight)
        signal = full_precision(x)
        spectrum = torch.fft.rfft2(signal, dim=(1, 2), norm="ortho")
        # contiguous: a model converted to channels_last has its four-dimensional weights permuted
        spectrum = spectrum * torch.view_as_complex(complex_weight.to(signal.dtype).contiguous())
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho").to(x.dtype)


def gate_by_products(x: Tensor, complex_weight: Tensor) -> Tensor:
    """`gate` by real matrices: the backward pass needs the spectrum (B, 2, H, F, C) alone, where F = W // 2 + 1."""
    batch, height, width, channels = x.shape
    # On a CPU arithmetic costs more than memory. Exported sizes may be open.
    dense = not is_exporting() and max(height, width) <= LARGEST_DENSE and not may_run(x)
    if dense:
        spectrum = multiply(matrix(dense_transform, height, width, like=x), x.flatten(1, 2))
    else:
        rows = multiply(matrix(width_transform, width, like=x), x.flatten(0, 1))
        spectrum = multiply(matrix(height_transform, height, like=x), rows.view(batch, 2 * height, -1))
    # The four products of real and imaginary parts, (out, in, H, F, C). The next matrix adds them up.
    real, imaginary = complex_weight.to(x.dtype).unbind(-1)
    weight = torch.stack((real, -imaginary, imaginary, real)).unflatten(0, (2, 2))
    parts = weight * spectrum.view(batch, 1, 2, height, -1, channels)
    if dense:
        y = multiply(matrix(dense_inverse, height, width, like=x), parts.flatten(1, 4))
    else:
        rows = multiply(matrix(height_inverse, height, like=x), parts.view(batch, 4 * height, -1))
        y = multiply(matrix(width_inverse, width, like=x), rows.view(batch * height, -1, channels))
    return y.view(x.shape)


# Orthonormal transforms of a real (H, W) grid as float64 matrices. Between the two axes lie (H, 2, F) numbers, real and
# imaginary part of each row's frequencies; the spectrum is (2, H, F).


@builder
def width_transform(width: int) -> Tensor:
    """(2F, W): a row to the real and then the imaginary parts of its frequencies."""
    cosine, sine = _waves(torch.arange(width // 2 + 1), width)
    return torch.cat((cosine, -sine))


@builder
def width_inverse(width: int) -> Tensor:
    """(W, 2F): like `irfft` it takes the other half of the spectrum for granted."""
    frequencies = torch.arange(width // 2 + 1)
    cosine, sine = _waves(frequencies, width)
    # All but the first frequency and, of an even width, the last stand for their mirror images too.
    times = torch.where((frequencies == 0) | (2 * frequencies == width), 1.0, 2.0)
    return torch.cat((cosine.T * times, -sine.T * times), 1)


@builder
def height_transform(height: int) -> Tensor:
    """(2H, 2H): (H, 2) complex numbers of a column to (2, H)."""
    cosine, sine = _waves(torch.arange(height), height)
    real, imaginary = torch.stack((cosine, sine), 2), torch.stack((-sine, cosine), 2)
    return torch.cat((real.flatten(1), imaginary.flatten(1)))


@builder
def height_inverse(height: int) -> Tensor:
    """(2H, 4H): (2, H) complex numbers of a column, each part as two addends (2, 2, H), to (H, 2)."""
    transposed = height_transform(height).T
    real, imaginary = transposed[:, :height], transposed[:, height:]
    return torch.cat((real, real, imaginary, imaginary), 1)


@builder
def dense_transform(height: int, width: int) -> Tensor:
    """(2HF, HW): both axes at once."""
    rows, columns = height_transform(height).view(2 * height, height, 2), width_transform(width).view(2, -1, width)
    return torch.einsum("khp,pfw->kfhw", rows, columns).flatten(2).flatten(0, 1)


@builder
def dense_inverse(height: int, width: int) -> Tensor:
    """(HW, 4HF): the inverse of both axes at once, of addends as in `height_inverse`."""
    rows, columns = height_inverse(height).view(height, 2, 4 * height), width_inverse(width).view(width, 2, -1)
    return torch.einsum("hpk,wpf->hwkf", rows, columns).flatten(2).flatten(0, 1)


def _waves(frequencies: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(frequencies, size) cosines and sines, each row of norm 1 with the other's.

    Of tensors alone: Python's arithmetic would fix a size that an export leaves open.
    """
    turns = (frequencies[:, None] * torch.arange(size) % size).double() / size
    length = torch.full((), size, dtype=torch.float64).sqrt()
    return (2 * math.pi * turns).cos() / length, (2 * math.pi * turns).sin() / length


@torch.fx.wrap
def resize_filter(complex_weight: Tensor, grid: Grid) -> Tensor:
    """A gate's weight for a grid of (H, W), by the authors' rule for fine-tuning at another resolution.

    A complex weight is an image of (H, W // 2 + 1) pixels and 2C channels, resampled bicubically with
    align_corners=True.
    """
    size = (grid[0], grid[1] // 2 + 1)
    if complex_weight.shape[:2] == size:
        return complex_weight
    resized = resize_grid(complex_weight.flatten(2), size, align_corners=True)
    return resized.unflatten(2, complex_weight.shape[2:])
