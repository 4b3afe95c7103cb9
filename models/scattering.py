"""The scattering mixer of SVT (section 3): wavelet transform, spectral blending, inverse transform."""

import torch
from torch import Tensor, nn

from .layers import Grid, GridMixer, autocast_off, resize_grid, resize_image
from .resampling import resampled
from .wavelet import WAVELET_BACKENDS, padded_grid

CHANNEL_BLOCKS = 4
# mixing -> what the high-pass bands go through, in order
MIXINGS = {
    "channel": ("channel_blend",),
    "channel_token": ("channel_blend", "token_blend"),
    "token": ("token_blend",),
    "token_half": ("token_blend",),
    "tensor": ("tensor_blend",),
}
HALVED = ("channel_token", "token_half")  # those that scatter half of the channels


def check_mixing(mixing: str) -> None:
    """See that there is such a mixing.

    Raises:
        ValueError: there is none.
    """
    if mixing not in MIXINGS:
        raise ValueError(f"mixing is one of {', '.join(MIXINGS)}, not {mixing!r}")


class EinsteinBlending(nn.Module):
    """Two complex block-diagonal layers, W2 relu(W1 x + b1) + b2, ReLU on real and imaginary part.

    Weights are (2, blocks, size, size), biases (2, blocks, size), real part first. Bands are
    (2, 6, B, h, w, C); `over` says what a block and a place in it are: "channels" (a block of channels, a
    channel in it) or "tokens" (a row of the grid, a position in the row; the same for every channel). Computed
    in the bands' dtype with autocast off. Blending over tokens, the weights are resampled for bands of another
    grid.
    """

    def __init__(self, blocks: int, size: int, over: str):
        super().__init__()
        self.over = over
        self.weight1 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.weight2 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.bias1 = nn.Parameter(0.02 * torch.randn(2, blocks, size))
        self.bias2 = nn.Parameter(0.02 * torch.randn(2, blocks, size))

    def forward(self, bands: Tensor) -> Tensor:
        blend = blend_channels if self.over == "channels" else blend_tokens
        return blend(bands, self.weight1, self.bias1, self.weight2, self.bias2)


def real_matrix(weight: Tensor) -> Tensor:
    """Complex (2, ..., d, k) as the real (..., 2d, 2k) from real and imaginary parts of d to those of k."""
    real, imaginary = weight
    return torch.cat((torch.cat((real, imaginary), -1), torch.cat((-imaginary, real), -1)), -2)


def real_bias(bias: Tensor) -> Tensor:
    """Complex (2, blocks, size) as the real (blocks, 2 * size)."""
    return torch.cat(bias.unbind(), -1)


@torch.fx.wrap
def blend_channels(bands: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """`EinsteinBlending` over channels."""
    _, blocks, size, _ = weight1.shape
    weight1, bias1, weight2, bias2 = (weight.to(bands.dtype) for weight in (weight1, bias1, weight2, bias2))
    with autocast_off(bands):
        x = bands.reshape(2, -1, blocks, size).permute(2, 1, 0, 3).reshape(blocks, -1, 2 * size)
        x = torch.baddbmm(real_bias(bias1)[:, None], x, real_matrix(weight1)).relu()
        x = torch.baddbmm(real_bias(bias2)[:, None], x, real_matrix(weight2))
        return x.view(blocks, -1, 2, size).permute(2, 1, 0, 3).reshape(bands.shape)


@torch.fx.wrap
def blend_tokens(bands: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    """`EinsteinBlending` over tokens."""
    _, count, batch, height, width, channels = bands.shape
    weight1, weight2 = (resize_token_weight(weight, (height, width)).to(bands.dtype) for weight in (weight1, weight2))
    bias1, bias2 = (resize_token_bias(bias, (height, width)).to(bands.dtype) for bias in (bias1, bias2))
    with autocast_off(bands):
        rows = bands.permute(3, 0, 4, 1, 2, 5).reshape(height, 2 * width, -1)
        rows = torch.baddbmm(real_bias(bias1)[..., None], real_matrix(weight1).mT, rows).relu_()
        rows = torch.baddbmm(real_bias(bias2)[..., None], real_matrix(weight2).mT, rows)
        return rows.view(height, 2, width, count, batch, channels).permute(1, 3, 4, 0, 2, 5)


def resize_token_weight(weight: Tensor, half: Grid) -> Tensor:
    """(2, h, w, w), rows, positions summed over and positions produced, to (2, *half, half width).

    Bicubic along each axis; multiplied by old / new width, which keeps the size of the sum.
    """
    return weight if weight.shape[1:3] == half else resampled(_resize_token_weight, weight, half)


def _resize_token_weight(weight: Tensor, half: Grid) -> Tensor:
    rows, width = half
    square = torch.stack([resize_image(part, (width, width), align_corners=False) for part in weight])
    flat = resize_image(square.flatten(2), (rows, width * width), align_corners=False)
    return flat.unflatten(2, (width, width)) * (weight.shape[2] / width)


def resize_token_bias(bias: Tensor, half: Grid) -> Tensor:
    """(2, h, w) to (2, *half), bicubic."""
    return bias if bias.shape[1:] == half else resize_image(bias, half, align_corners=False)


class TensorBlending(nn.Module):
    """Every coefficient of the bands (2, 6, B, h, w, C) times a weight of its own.

    Real part with real weight, imaginary with imaginary: (12, h, w, C), those of the real parts first. For bands of
    another grid the weights are resampled.
    """

    def __init__(self, half: Grid, channels: int):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(12, *half, channels))

    def forward(self, bands: Tensor) -> Tensor:
        weight = resize_planes(self.weight, bands.shape[3:5]).to(bands.dtype)
        return bands * weight.unflatten(0, (2, 6)).unsqueeze(2)


@torch.fx.wrap
def resize_low_pass(low_pass: Tensor, grid: Grid) -> Tensor:
    """(H', W', C) for another even grid, bicubic."""
    return low_pass if low_pass.shape[:2] == grid else resampled(_resize_plane, low_pass, grid)


def _resize_plane(plane: Tensor, grid: Grid) -> Tensor:
    return resize_grid(plane, grid, align_corners=False)


@torch.fx.wrap
def resize_planes(weight: Tensor, half: Grid) -> Tensor:
    """(12, h, w, C) to (12, *half, C), bicubic."""
    return weight if weight.shape[1:3] == half else resampled(_resize_planes, weight, half)


def _resize_planes(weight: Tensor, half: Grid) -> Tensor:
    return torch.stack([_resize_plane(plane, half) for plane in weight])


class ScatteringMixer(GridMixer):
    """Wavelet transform of the token grid with learned blending of its bands: (B, H, W, C) to (B, H, W, C).

    The low-pass image is multiplied by `low_pass` (H', W', C) (tensor blending; H', W' even). `mixing` says what
    the high-pass bands go through: "channel" or "token", Einstein blending over channels or over tokens; "tensor",
    tensor blending as well; "channel_token", both Einstein blendings, or "token_half", the second alone, on half
    of the channels, while the other half takes a depthwise 3x3 convolution and the two are interleaved channel by
    channel. How exact the rest is under autocast says `spectral_precision`.

    Raises:
        ValueError: there is no such mixing or backend, or the channels make no whole blocks.
    """

    def __init__(self, dim: int, grid_size: Grid, mixing: str = "channel", backend: str = "native"):
        super().__init__()
        check_mixing(mixing)
        if backend not in WAVELET_BACKENDS:
            raise ValueError(f"the wavelet backend is one of {', '.join(WAVELET_BACKENDS)}, not {backend!r}")
        blends = MIXINGS[mixing]
        self.halved = mixing in HALVED
        multiple = (2 if self.halved else 1) * (CHANNEL_BLOCKS if "channel_blend" in blends else 1)
        if dim % multiple:
            raise ValueError(f"mixing={mixing!r} takes a multiple of {multiple} channels, not {dim}")
        self.grid_size = grid_size
        self.mixing = mixing
        channels = dim // 2 if self.halved else dim
        height, width = padded_grid(grid_size)
        self.wavelet = WAVELET_BACKENDS[backend](grid_size)
        self.low_pass = nn.Parameter(0.02 * torch.randn(height, width, channels))
        if "channel_blend" in blends:
            self.channel_blend = EinsteinBlending(CHANNEL_BLOCKS, channels // CHANNEL_BLOCKS, "channels")
        if "token_blend" in blends:
            self.token_blend = EinsteinBlending(height // 2, width // 2, "tokens")
        if "tensor_blend" in blends:
            self.tensor_blend = TensorBlending((height // 2, width // 2), channels)
        if self.halved:
            self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if not self.halved:
            return self.scatter(x)
        local, spectral = x.chunk(2, -1)
        local = self.conv(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return torch.stack((local, self.scatter(spectral)), -1).flatten(-2)

    def scatter(self, x: Tensor) -> Tensor:
        """Transform, blending, inverse transform."""
        low, bands = self.wavelet(self.spectral_input(x))
        low = low * resize_low_pass(self.low_pass, low.shape[1:3]).to(low.dtype)
        return self.wavelet.inverse(low, self.blend(bands), x.shape[1:3])

    def blend(self, bands: Tensor) -> Tensor:
        """Blend the bands (2, 6, B, h, w, C)."""
        for name in MIXINGS[self.mixing]:
            bands = self.get_submodule(name)(bands)
        return bands

    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample all weights that depend on the grid to another (H, W) for good."""
        super().set_grid_size(grid_size)
        self.wavelet.set_grid_size(grid_size)

    @staticmethod
    def resize_weights(weights: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """Those of the mixer's weights that depend on the grid, for another (H, W). The others pass through.

        The authors released no rule for scattering; this is ours, modelled on theirs for position embeddings:
        bicubic, align_corners=False, along each axis.
        """
        height, width = padded_grid(grid)
        half = (height // 2, width // 2)
        rules = {
            "low_pass": (3, resize_low_pass, (height, width)),
            "token_blend.weight1": (4, resize_token_weight, half),
            "token_blend.weight2": (4, resize_token_weight, half),
            "token_blend.bias1": (3, resize_token_bias, half),
            "token_blend.bias2": (3, resize_token_bias, half),
            "tensor_blend.weight": (4, resize_planes, half),
        }
        resized = dict(weights)
        for name, (ndim, resize, size) in rules.items():
            if name in weights and weights[name].ndim == ndim:
                resized[name] = resize(weights[name], size)
        return resized
