"""The Fourier transform of a small grid as real matrices: where an FFT is slow, missing, or not to be had."""

import math

import torch
from torch import Tensor

from .layers import Grid


def fourier_matrices(grid: Grid, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The orthonormal transform of a real (H, W) grid and its inverse, by axis.

    columns (2 * (W // 2 + 1), W): to real and imaginary parts; rows and rows_back (2H, 2H): of complex numbers;
    columns_back (W, 2 * (W // 2 + 1)): to real numbers, which like `irfft` takes the spectrum's other half for granted.
    Complex numbers are their real parts followed by their imaginary ones.
    """
    height, width = grid
    cosine, sine = _waves(torch.arange(height), height, dtype)
    rows = torch.cat((torch.cat((cosine, sine), 1), torch.cat((-sine, cosine), 1)))
    frequencies = torch.arange(width // 2 + 1)
    cosine, sine = _waves(frequencies, width, dtype)
    # All but the first frequency and, of an even width, the last stand for their mirror images too.
    times = torch.where((frequencies == 0) | (2 * frequencies == width), 1.0, 2.0).to(dtype)
    return {
        "columns": torch.cat((cosine, -sine)),
        "rows": rows,
        "rows_back": rows.T,
        "columns_back": torch.cat((cosine.T * times, -sine.T * times), 1),
    }


def _waves(frequencies: Tensor, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(frequencies, size) cosines and sines, each row of norm 1 with the other's.

    Of tensors alone: Python's arithmetic would fix a size that is to be dynamic. The remainder, of integers, keeps
    angles within one turn, where float32 is exact enough.
    """
    turns = (frequencies[:, None] * torch.arange(size) % size).to(dtype) / size
    length = torch.full((), size, dtype=dtype).sqrt()
    return (2 * math.pi * turns).cos() / length, (2 * math.pi * turns).sin() / length
