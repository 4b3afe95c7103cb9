"""The scattering mixer of SVT (section 3): wavelet transform, spectral blending, inverse transform."""

import torch
from torch import Tensor, nn

from .blending import EinsteinBlending, TensorBlending, resize_planes, resize_token_weight
from .cpu.scattering import scatter
from .layers import GridMixer
from .library_wavelet import library_analyse, library_synthesise, library_transforms
from .resampling import Grid, resize_grid, resize_image
from .wavelet import analyse, padded_grid, synthesise

# torch.fx must not trace these. It looks wrapped functions up in the module that calls them.
for _name in ("analyse", "library_analyse", "library_synthesise", "resize_grid", "synthesise"):
    torch.fx.wrap(_name)

CHANNEL_BLOCKS = 4
# mixing -> the modules applied to the high-pass bands, in order
MIXINGS = {
    "channel": ("channel_blend",),
    "channel_token": ("channel_blend", "token_blend"),
    "token": ("token_blend",),
    "token_half": ("token_blend",),
    "tensor": ("tensor_blend",),
}
HALVED = ("channel_token", "token_half")  # transform half of the channels


class ScatteringMixer(GridMixer):
    """Wavelet transform of the token grid with learned blending of its bands: (B, H, W, C) to (B, H, W, C).

    The low-pass image is multiplied by `low_pass` (H', W', C), H' and W' even (tensor blending). `mixing` chooses the
    blending of the high-pass bands: "channel" or "token", Einstein blending over channels or tokens; "tensor", tensor
    blending; "channel_token", both Einstein blendings; "token_half", Einstein blending over tokens. The last two act
    on half of the channels; the other half passes through a depthwise 3x3 convolution, and the two are interleaved
    channel by channel. `backend` computes the transform: "native" or "pytorch_wavelets", which needs that package.

    Raises:
        ValueError: if the backend is unknown, or the number of channels is not divisible into blocks.
    """

    def __init__(self, dim: int, grid_size: Grid, mixing: str = "channel", backend: str = "native"):
        super().__init__()
        if backend not in ("native", "pytorch_wavelets"):
            raise ValueError(f"wavelet_backend must be native or pytorch_wavelets, not {backend!r}")
        self.native = backend == "native"
        if not self.native:
            library_transforms(torch.float32, torch.device("cpu"))  # a missing package raises here
        blends = MIXINGS[mixing]
        self.halved = mixing in HALVED
        multiple = (2 if self.halved else 1) * (CHANNEL_BLOCKS if "channel_blend" in blends else 1)
        if dim % multiple:
            raise ValueError(f"mixing={mixing!r} needs a multiple of {multiple} channels, not {dim}")
        self.grid_size = grid_size
        self.mixing = mixing
        channels = dim // 2 if self.halved else dim
        height, width = padded_grid(grid_size)
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
        """Apply the wavelet transform, the blending and the inverse transform."""
        low_pass = resize_grid(self.low_pass, padded_grid(x.shape[1:3]))
        if self.native and self.mixing == "channel":
            half = self.spectral_precision == "half"
            if (y := scatter(x, low_pass, self.channel_blend, half)) is not None:
                return y
        signal = self.spectral_input(x)
        low, bands = analyse(signal) if self.native else library_analyse(signal)
        for name in MIXINGS[self.mixing]:
            bands = self.get_submodule(name)(bands)
        low = low * low_pass.to(low.dtype)
        return (synthesise if self.native else library_synthesise)(low, bands, x.shape[1:3])

    @staticmethod
    def resize_weight(name: str, weight: Tensor, grid: Grid) -> Tensor:
        """Resample a weight to another (H, W).

        The authors released no rule for scattering. This one follows their rule for position embeddings: bicubic,
        align_corners=False, along each axis.
        """
        height, width = padded_grid(grid)
        half = (height // 2, width // 2)
        if name == "low_pass":
            return resize_grid(weight, (height, width))
        if name == "tensor_blend.weight":
            return resize_planes(weight, half)
        if name.startswith("token_blend.weight"):
            return resize_token_weight(weight, half)
        return resize_image(weight, half) if name.startswith("token_blend.bias") else weight
