"""The spectral gating network (SpectFormer, section 3; introduced by GFNet)."""

import torch
from torch import Tensor, nn

from .layers import Grid, GridMixer, autocast_off, full_precision, resize_grid
from .resampling import resampled


@torch.fx.wrap
def gate(x: Tensor, complex_weight: Tensor) -> Tensor:
    """FFT over the (B, H, W, C) grid, times (H, W // 2 + 1, C, 2), inverse FFT; in float32 or float64."""
    with autocast_off(x):
        signal = full_precision(x)
        spectrum = torch.fft.rfft2(signal, dim=(1, 2), norm="ortho")
        # contiguous: a model converted to channels_last has its four-dimensional weights permuted
        spectrum = spectrum * torch.view_as_complex(complex_weight.to(signal.dtype).contiguous())
        return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho").to(x.dtype)


@torch.fx.wrap
def resize_filter(complex_weight: Tensor, grid: Grid) -> Tensor:
    """A gate's weight for a grid of (H, W), by the authors' rule for fine-tuning at another resolution.

    A complex weight is an image of (H, W // 2 + 1) pixels and 2C channels, resampled bicubically with
    align_corners=True.
    """
    size = (grid[0], grid[1] // 2 + 1)
    if complex_weight.shape[:2] == size:
        return complex_weight
    return resampled(_resize_filter, complex_weight, size)


def _resize_filter(complex_weight: Tensor, size: Grid) -> Tensor:
    resized = resize_grid(complex_weight.flatten(2), size, align_corners=True)
    return resized.unflatten(2, complex_weight.shape[2:])


class SpectralGate(GridMixer):
    """A learned filter over the token grid: FFT, times a complex weight, inverse FFT.

    (B, H, W, C) to (B, H, W, C). Computed in float32 with autocast off (float64 stays float64) and returned in the
    input's dtype; on a CPU by products of matrices where the grid is small, and then in half precision where
    `spectral_precision` allows. `complex_weight` is (H, W // 2 + 1, C, 2), real and imaginary part last; for a grid
    other than `grid_size` it is resampled.
    """

    def __init__(self, dim: int, grid_size: Grid):
        super().__init__()
        self.grid_size = grid_size
        height, width = grid_size
        self.complex_weight = nn.Parameter(0.02 * torch.randn(height, width // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        return gate(x, resize_filter(self.complex_weight, x.shape[1:3]))

    @staticmethod
    def resize_weights(weights: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """See `resize_filter`."""
        weight = weights.get("complex_weight")
        if weight is None or weight.ndim != 4:
            return weights
        return weights | {"complex_weight": resize_filter(weight, grid)}
