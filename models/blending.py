"""Einstein and tensor blending of the bands of the wavelet transform (SVT, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .precision import autocast_off
from .resampling import Grid, resize_grid, resize_image

# Up to this many real channels, a product with one block-diagonal matrix is as fast on a GPU as reading and writing the
# rows, and avoids copying the blocks. Not used on the meta device, where FLOPs are counted.
LARGEST_DENSE = 256


class EinsteinBlending(nn.Module):
    """Two complex block-diagonal layers, W2 relu(W1 x + b1) + b2, with ReLU on real and imaginary part.

    Weights are (2, blocks, size, size), biases (2, blocks, size), bands (B, h, w, 6, 2, C), real part first. With
    over="channels", a block is a block of channels. With over="tokens", a block is a row of the grid and mixes its
    positions, with the same weights for every channel; weights are resampled for bands of another grid. Computes in
    the bands' dtype with autocast off.
    """

    def __init__(self, blocks: int, size: int, over: str):
        super().__init__()
        self.over = over
        self.weight1 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.weight2 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.bias1 = nn.Parameter(0.02 * torch.randn(2, blocks, size))
        self.bias2 = nn.Parameter(0.02 * torch.randn(2, blocks, size))

    def forward(self, bands: Tensor) -> Tensor:
        if self.over == "channels":
            return blend_channels(bands, *self.real_layers())
        return blend_tokens(bands, self.weight1, self.bias1, self.weight2, self.bias2)

    def real_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return both layers as real matrices (blocks, 2 * size, 2 * size) and biases (blocks, 2 * size)."""
        return real_matrix(self.weight1), real_bias(self.bias1), real_matrix(self.weight2), real_bias(self.bias2)


@torch.fx.wrap
def real_matrix(weight: Tensor) -> Tensor:
    """Convert a complex matrix (2, ..., d, k) to a real one (..., 2d, 2k), real parts before imaginary parts."""
    real, imaginary = weight
    return torch.cat((torch.cat((real, imaginary), -1), torch.cat((-imaginary, real), -1)), -2)


@torch.fx.wrap
def real_bias(bias: Tensor) -> Tensor:
    """Convert a complex bias (2, ..., size) to a real one (..., 2 * size)."""
    return torch.cat(bias.unbind(), -1)


@torch.fx.wrap
def blend_channels(bands: Tensor, matrix1: Tensor, bias1: Tensor, matrix2: Tensor, bias2: Tensor) -> Tensor:
    """`EinsteinBlending` over channels of bands (..., 2, C), with the arguments from `real_layers`."""
    matrix1, bias1, matrix2, bias2 = (weight.to(bands.dtype) for weight in (matrix1, bias1, matrix2, bias2))
    blocks, size = len(bias1), bias1.shape[1] // 2
    with autocast_off(bands):
        if 2 * blocks * size <= LARGEST_DENSE and not bands.is_meta:
            x = F.linear(bands.flatten(-2), block_diagonal(matrix1).T, _by_part(bias1)).relu()
            return F.linear(x, block_diagonal(matrix2).T, _by_part(bias2)).view(bands.shape)
        x = bands.reshape(-1, 2, blocks, size).permute(2, 0, 1, 3).reshape(blocks, -1, 2 * size)
        x = torch.baddbmm(bias1[:, None], x, matrix1).relu()
        x = torch.baddbmm(bias2[:, None], x, matrix2)
        return x.view(blocks, -1, 2, size).permute(1, 2, 0, 3).reshape(bands.shape)


def block_diagonal(matrices: Tensor) -> Tensor:
    """Combine matrices (blocks, 2d, 2d) into one (2C, 2C), all real parts before all imaginary parts."""
    blocks, size = len(matrices), matrices.shape[1] // 2
    of_blocks = torch.eye(blocks, dtype=matrices.dtype, device=matrices.device)[:, None, None, None, :, None]
    parts = matrices.view(blocks, 2, size, 2, 1, size) * of_blocks  # (block, part, channel) to (part, block, channel)
    return parts.transpose(0, 1).reshape(2 * blocks * size, 2 * blocks * size)


def _by_part(bias: Tensor) -> Tensor:
    """Reorder a bias (blocks, 2 * size) to (2C,), all real parts first."""
    return bias.unflatten(1, (2, -1)).transpose(0, 1).flatten()


@torch.fx.wrap
def blend_tokens(bands: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """`EinsteinBlending` over tokens."""
    batch, height, width, *_, channels = bands.shape
    weight1, weight2 = (resize_token_weight(weight, (height, width)).to(bands.dtype) for weight in (weight1, weight2))
    bias1, bias2 = (resize_image(bias, (height, width)).to(bands.dtype) for bias in (bias1, bias2))
    with autocast_off(bands):
        rows = bands.permute(1, 4, 2, 0, 3, 5).reshape(height, 2 * width, -1)
        rows = torch.baddbmm(real_bias(bias1)[..., None], real_matrix(weight1).mT, rows).relu()
        rows = torch.baddbmm(real_bias(bias2)[..., None], real_matrix(weight2).mT, rows)
        return rows.view(height, 2, width, batch, 6, channels).permute(3, 0, 2, 4, 1, 5).contiguous()


def resize_token_weight(weight: Tensor, half: Grid) -> Tensor:
    """Resample a weight (2, rows, input positions, output positions) to the grid `half`.

    Bicubic along each axis, times old width / new width to preserve the magnitude of the sum over positions.
    """
    if weight.shape[1:3] == half:
        return weight
    rows, width = half
    square = torch.stack([resize_image(part, (width, width)) for part in weight])
    flat = resize_image(square.flatten(2), (rows, width * width))
    return flat.unflatten(2, (width, width)) * (weight.shape[2] / width)


class TensorBlending(nn.Module):
    """Multiply every coefficient of the bands (B, h, w, 6, 2, C) by its own weight.

    Real and imaginary parts have separate weights (12, h, w, C), those of the real parts first. The weights are
    resampled for bands of another grid.
    """

    def __init__(self, half: Grid, channels: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(12, *half, channels))

    def forward(self, bands: Tensor) -> Tensor:
        weight = resize_planes(self.weight, bands.shape[1:3]).to(bands.dtype)
        return bands * weight.unflatten(0, (2, 6)).permute(2, 3, 1, 0, 4)


@torch.fx.wrap
def resize_planes(weight: Tensor, half: Grid) -> Tensor:
    """Resample (12, h, w, C) to (12, *half, C), bicubic."""
    if weight.shape[1:3] == half:
        return weight
    return torch.stack([resize_grid(plane, half) for plane in weight])
