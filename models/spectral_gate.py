"""The spectral gating network (SpectFormer, section 3; introduced by GFNet)."""

import torch
from torch import Tensor, nn

from .layers import Grid, autocast_off, full_precision, resize_grid


class SpectralGate(nn.Module):
    """A learned filter over the token grid: FFT, times a complex weight, inverse FFT.

    (B, H, W, C) to (B, H, W, C). Computed in float32 with autocast off (float64 stays float64) and returned
    in the input's dtype. `complex_weight` is (H, W // 2 + 1, C, 2), real and imaginary part last; for a grid
    other than `grid_size` it is resampled.
    """

    def __init__(self, dim: int, grid_size: Grid):
        super().__init__()
        self.grid_size = grid_size
        height, width = grid_size
        self.complex_weight = nn.Parameter(0.02 * torch.randn(height, width // 2 + 1, dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        with autocast_off(x):
            signal = full_precision(x)
            weight = self.complex_weight if grid == self.grid_size else self._resampled(grid)
            spectrum = torch.fft.rfft2(signal, dim=(1, 2), norm="ortho")
            # contiguous: a model converted to channels_last has its four-dimensional weights permuted
            spectrum = spectrum * torch.view_as_complex(weight.to(signal.dtype).contiguous())
            return torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho").to(x.dtype)

    def _resampled(self, grid: Grid) -> Tensor:
        return self.resize_weights({"complex_weight": self.complex_weight}, grid)["complex_weight"]

    @torch.no_grad()
    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample the filter to another (H, W) for good."""
        self.complex_weight = nn.Parameter(self._resampled(grid_size), self.complex_weight.requires_grad)
        self.grid_size = grid_size

    @staticmethod
    def resize_weights(weights: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """The gate's weights for another (H, W), by the authors' rule for fine-tuning at another resolution.

        A complex weight is an image of (H, W // 2 + 1) pixels and 2C channels, resampled bicubically with
        align_corners=True.
        """
        weight = weights.get("complex_weight")
        size = (grid[0], grid[1] // 2 + 1)
        if weight is None or weight.ndim != 4 or weight.shape[:2] == size:
            return weights
        resized = resize_grid(weight.flatten(2), size, align_corners=True)
        return weights | {"complex_weight": resized.unflatten(2, weight.shape[2:])}
