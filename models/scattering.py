"""The scattering mixer of SVT (section 3): wavelet transform, spectral blending, inverse transform."""

from itertools import chain

import torch
from torch import Tensor, nn

from .layers import Grid, autocast_off, full_precision, resize_grid, resize_image
from .scattering_cpu import ScatterInSlices
from .slicing import may_slice
from .wavelet import DTCWT, WAVELET_BACKENDS, in_order_of_phase, padded_grid

CHANNEL_BLOCKS = 4
# mixing -> what the number of channels must be a multiple of
MIXINGS = {"channel": CHANNEL_BLOCKS, "channel_token": 2 * CHANNEL_BLOCKS, "token": 1}


def check_mixing(mixing: str) -> None:
    """ValueError unless there is such a mixing."""
    if mixing not in MIXINGS:
        raise ValueError(f"mixing is one of {', '.join(MIXINGS)}, not {mixing!r}")


class EinsteinBlending(nn.Module):
    """Two complex block-diagonal layers, W2 relu(W1 x + b1) + b2, ReLU on real and imaginary part.

    Weights are (2, blocks, size, size), biases (2, blocks, size), real part first. Bands are
    (2, 6, B, h, w, C); `over` says what a block and a place in it are: "channels" (a block of channels, a
    channel in it) or "tokens" (a row of the grid, a position in the row; the same for every channel).
    """

    def __init__(self, blocks: int, size: int, over: str):
        super().__init__()
        self.over = over
        self.weight1 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.weight2 = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
        self.bias1 = nn.Parameter(0.02 * torch.randn(2, blocks, size))
        self.bias2 = nn.Parameter(0.02 * torch.randn(2, blocks, size))

    def forward(self, bands: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
        """`weights`, named as the parameters, stand in for them on another grid."""
        own = weights or dict(self.named_parameters())
        own = {name: weight.to(bands.dtype) for name, weight in own.items()}
        blend = _blend_channels if self.over == "channels" else _blend_tokens
        return blend(bands, own["weight1"], own["bias1"], own["weight2"], own["bias2"])

    def real_layers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The layers as `ScatterInSlices` takes them."""
        return (
            _real_matrix(self.weight1),
            _real_bias(self.bias1),
            _real_matrix(self.weight2),
            _real_bias(self.bias2),
        )


def _real_matrix(weight: Tensor) -> Tensor:
    """Complex (2, ..., d, k) as the real (..., 2d, 2k) from real and imaginary parts of d to those of k."""
    real, imaginary = weight
    return torch.cat((torch.cat((real, imaginary), -1), torch.cat((-imaginary, real), -1)), -2)


def _real_bias(bias: Tensor) -> Tensor:
    """Complex (2, blocks, size) as the real (blocks, 2 * size)."""
    return torch.cat(bias.unbind(), -1)


def _blend_channels(bands: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    _, blocks, size, _ = weight1.shape
    x = bands.reshape(2, -1, blocks, size).permute(2, 1, 0, 3).reshape(blocks, -1, 2 * size)
    x = torch.baddbmm(_real_bias(bias1)[:, None], x, _real_matrix(weight1)).relu()
    x = torch.baddbmm(_real_bias(bias2)[:, None], x, _real_matrix(weight2))
    return x.view(blocks, -1, 2, size).permute(2, 1, 0, 3).reshape(bands.shape)


def _blend_tokens(bands: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
    _, count, batch, height, width, channels = bands.shape
    rows = bands.permute(3, 0, 4, 1, 2, 5).reshape(height, 2 * width, -1)
    rows = torch.baddbmm(_real_bias(bias1)[..., None], _real_matrix(weight1).mT, rows).relu_()
    rows = torch.baddbmm(_real_bias(bias2)[..., None], _real_matrix(weight2).mT, rows)
    return rows.view(height, 2, width, count, batch, channels).permute(1, 3, 4, 0, 2, 5)


class ScatteringMixer(nn.Module):
    """Wavelet transform of the token grid with learned blending of its bands: (B, H, W, C) to (B, H, W, C).

    The low-pass image is multiplied by `low_pass` (H', W', C) (tensor blending; H', W' even), the high-pass
    bands go through Einstein blending. mixing: "channel"; "token"; or "channel_token", where the first half
    of the channels takes a depthwise 3x3 convolution, the other half scattering with channel blending and
    then token blending, and the two are interleaved channel by channel. Computed in float32 with autocast
    off, but for the convolution. ValueError for an unknown mixing or backend, and for channels that make no
    whole blocks.
    """

    def __init__(self, dim: int, grid_size: Grid, mixing: str = "channel", backend: str = "native"):
        super().__init__()
        check_mixing(mixing)
        if backend not in WAVELET_BACKENDS:
            raise ValueError(f"the wavelet backend is one of {', '.join(WAVELET_BACKENDS)}, not {backend!r}")
        self.grid_size = grid_size
        self.mixing = mixing
        channels = dim // 2 if mixing == "channel_token" else dim
        if dim % MIXINGS[mixing]:
            raise ValueError(f"mixing={mixing!r} takes a multiple of {MIXINGS[mixing]} channels, not {dim}")
        height, width = padded_grid(grid_size)
        self.wavelet = WAVELET_BACKENDS[backend](grid_size)
        self.low_pass = nn.Parameter(0.02 * torch.randn(height, width, channels))
        if mixing != "token":
            self.channel_blend = EinsteinBlending(CHANNEL_BLOCKS, channels // CHANNEL_BLOCKS, "channels")
        if mixing != "channel":
            self.token_blend = EinsteinBlending(height // 2, width // 2, "tokens")
        if mixing == "channel_token":
            self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.mixing != "channel_token":
            return self._scatter(x)
        local, spectral = x.chunk(2, -1)
        local = self.conv(local.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return torch.stack((local, self._scatter(spectral)), -1).flatten(-2)

    def _scatter(self, x: Tensor) -> Tensor:
        grid = (x.shape[1], x.shape[2])
        low_pass, token_weights = self._grid_weights(grid)
        with autocast_off(x):
            if self._runs_in_slices(x):
                return self._scatter_in_slices(x)
            low, high = self.wavelet(full_precision(x))
            if self.mixing != "token":
                high = self.channel_blend(high)
            if self.mixing != "channel":
                high = self.token_blend(high, token_weights)
            return self.wavelet.inverse(low * low_pass.to(low.dtype), high, grid).to(x.dtype)

    def _runs_in_slices(self, x: Tensor) -> bool:
        """Where that may be, for channel blending on the grid of construction."""
        return (
            self.mixing == "channel"
            and isinstance(self.wavelet, DTCWT)
            and may_slice(x, self.wavelet, self.channel_blend)
            and x.shape[1:3] == self.grid_size
            and x.dtype == self.low_pass.dtype
        )

    def _scatter_in_slices(self, x: Tensor) -> Tensor:
        matrices = (self.wavelet.matrices(name, self.grid_size, x) for name in ("analysis", "synthesis"))
        layers = self.channel_blend.real_layers()
        # The low-pass image is multiplied by sqrt(2) going in and coming out.
        low_weight = 2 * in_order_of_phase(self.low_pass)
        return ScatterInSlices.apply(x, torch.is_grad_enabled(), *chain(*matrices), low_weight, *layers)

    def _grid_weights(self, grid: Grid) -> tuple[Tensor, dict[str, Tensor] | None]:
        """`low_pass` and, away from the grid of construction, the token blending weights, resampled."""
        if grid == self.grid_size:
            return self.low_pass, None
        weights = self.resize_weights(self._weights_of_grid(), grid)
        low_pass = weights.pop("low_pass")
        return low_pass, {name.removeprefix("token_blend."): value for name, value in weights.items()}

    def _weights_of_grid(self) -> dict[str, Tensor]:
        return {
            name: weight
            for name, weight in self.named_parameters()
            if name == "low_pass" or name.startswith("token_blend.")
        }

    @torch.no_grad()
    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample all weights that depend on the grid to another (H, W) for good."""
        old = self._weights_of_grid()
        for name, weight in self.resize_weights(old, grid_size).items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(weight, old[name].requires_grad))
        self.wavelet.set_grid_size(grid_size)
        self.grid_size = grid_size

    @staticmethod
    def resize_weights(weights: dict[str, Tensor], grid: Grid) -> dict[str, Tensor]:
        """Those of the mixer's weights that depend on the grid, for another (H, W). The others pass through.

        The authors released no rule for scattering; this is ours, modelled on theirs for position embeddings:
        bicubic, align_corners=False, along each axis. A token blending sums over the positions of a row: its
        weights are multiplied by old / new width, which keeps the size of the sum.
        """
        height, width = padded_grid(grid)
        half = (height // 2, width // 2)
        resized = dict(weights)
        for name, weight in weights.items():
            if name == "low_pass" and weight.ndim == 3 and weight.shape[:2] != (height, width):
                resized[name] = resize_grid(weight, (height, width), align_corners=False)
            elif name.startswith("token_blend.bias") and weight.ndim == 3 and weight.shape[1:] != half:
                resized[name] = resize_image(weight, half, align_corners=False)
            elif name.startswith("token_blend.weight") and weight.ndim == 4 and weight.shape[1:3] != half:
                resized[name] = _resize_token_weight(weight, half)
        return resized


def _resize_token_weight(weight: Tensor, half: Grid) -> Tensor:
    """(2, h, w, w) to (2, *half, half width): rows, positions summed over and positions produced."""
    rows, width = half
    square = torch.stack([resize_image(part, (width, width), align_corners=False) for part in weight])
    flat = resize_image(square.flatten(2), (rows, width * width), align_corners=False)
    return flat.unflatten(2, (width, width)) * (weight.shape[2] / width)
