"""The transform of wavelet.py, computed by the optional package pytorch_wavelets."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from .precision import autocast_off, full_precision
from .resampling import Grid


@lru_cache
def library_transforms(dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    """The package's transform and inverse; raises ImportError without the package."""
    try:
        from pytorch_wavelets import DTCWTForward, DTCWTInverse
    except ImportError as error:
        raise ImportError(
            f"wavelet_backend='pytorch_wavelets': install pytorch_wavelets and setuptools<81 ({error})"
        ) from error
    forward = DTCWTForward(J=1, biort="near_sym_b", qshift="qshift_b")
    inverse = DTCWTInverse(biort="near_sym_b", qshift="qshift_b")
    return forward.to(device, dtype), inverse.to(device, dtype)


def library_analyse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `wavelet.analyse`, in float32 or more."""
    with autocast_off(x):
        signal = full_precision(x).permute(0, 3, 1, 2)
        transform, _ = library_transforms(signal.dtype, signal.device)
        low, (bands,) = transform(signal)
        return low.permute(0, 2, 3, 1).to(x.dtype), bands.permute(0, 3, 4, 2, 5, 1).to(x.dtype)


def library_synthesise(low: Tensor, bands: Tensor, grid: Grid) -> Tensor:
    """Compute `wavelet.synthesise`, in float32 or more."""
    with autocast_off(low):
        image = full_precision(low).permute(0, 3, 1, 2)
        _, transform = library_transforms(image.dtype, image.device)
        x = transform((image, [full_precision(bands).permute(0, 5, 3, 1, 2, 4)]))
        return x[:, :, : grid[0], : grid[1]].permute(0, 2, 3, 1).to(low.dtype)
