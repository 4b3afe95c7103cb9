"""The published models in their plain formulation: an oracle for values.

Every operation is written the way the papers write it, with no thought for memory traffic: softmax
attention spelt out, with separate query and key-value projections, `torch.fft` over the strided token grid,
the wavelet transform of `pytorch_wavelets`, one einsum for each real product of a complex layer, and tokens
permuted to images and back around every convolution. Parameters carry the names of the authors' checkpoints,
so that a checkpoint loads with `load_state_dict` and no conversion.

SpectFormer: arXiv 2304.06446. SVT: arXiv 2311.01310.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIX_STRIDE = 8  # a token of the last stage covers 8 x 8 tokens of the stem


class Attention(nn.Module):
    """Softmax attention over (B, N, C) with one projection each for queries, keys and values together."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attend(self.q(x), *self.kv(x).chunk(2, dim=-1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).flatten(2))


class FusedAttention(Attention):
    """The vanilla model's attention, which has one projection for all three."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__(dim, num_heads)
        del self.q, self.kv
        self.qkv = nn.Linear(dim, 3 * dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attend(*self.qkv(x).chunk(3, dim=-1))


class ClassAttention(Attention):
    """The first of the (B, N, C) tokens asks, all answer: (B, 1, C)."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.attend(self.q(x[:, :1]), *self.kv(x).chunk(2, dim=-1))


class SpectralGate(nn.Module):
    """A learned complex weight for each frequency and channel of the (B, N, C) tokens' grid."""

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(0.02 * torch.randn(grid[0], grid[1] // 2 + 1, dim, 2))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        image = x.unflatten(1, grid).float()
        with torch.autocast(x.device.type, enabled=False):
            spectrum = torch.fft.rfft2(image, dim=(1, 2), norm="ortho")
            spectrum = spectrum * torch.view_as_complex(self.complex_weight)
            image = torch.fft.irfft2(spectrum, s=grid, dim=(1, 2), norm="ortho")
        return image.flatten(1, 2)


Complex = tuple[Tensor, Tensor]  # real and imaginary part


def complex_layer(x: Complex, weight: Tensor, bias: Tensor) -> Complex:
    """W x + b over (..., blocks, size) complex numbers, as four real einsums."""
    (re, im), product = x, partial(torch.einsum, "...bd,bdk->...bk")
    return (
        product(re, weight[0]) - product(im, weight[1]) + bias[0],
        product(re, weight[1]) + product(im, weight[0]) + bias[1],
    )


class Scattering(nn.Module):
    """Dual-tree complex wavelet mixer of (B, N, C) tokens, mixing "channel", "token" or "channel_token"."""

    def __init__(self, dim: int, grid: tuple[int, int], mixing: str = "channel") -> None:
        from pytorch_wavelets import DTCWTForward, DTCWTInverse

        super().__init__()
        self.mixing = mixing
        grid = tuple(side + side % 2 for side in grid)  # the transform repeats the last row of an odd grid
        self.width = dim // 2 if mixing == "channel_token" else dim
        self.xfm = DTCWTForward(J=1, biort="near_sym_b", qshift="qshift_b")
        self.ifm = DTCWTInverse(biort="near_sym_b", qshift="qshift_b")
        self.complex_weight_ll = nn.Parameter(0.02 * torch.randn(self.width, *grid))
        if "channel" in mixing:
            self._add_layers("", 4, self.width // 4)
        if "token" in mixing:
            self._add_layers("_t", grid[0] // 2, grid[1] // 2)
        if mixing == "channel_token":
            self.conv = nn.Conv2d(self.width, self.width, 3, padding=1, groups=self.width)

    def _add_layers(self, suffix: str, blocks: int, size: int) -> None:
        for layer in "12":
            weight = nn.Parameter(0.02 * torch.randn(2, blocks, size, size))
            bias = nn.Parameter(0.02 * torch.randn(2, blocks, size))
            self.register_parameter(f"complex_weight_lh_{layer}{suffix}", weight)
            self.register_parameter(f"complex_weight_lh_b{layer}{suffix}", bias)

    def _blend(self, x: Complex, suffix: str) -> Complex:
        weights = [getattr(self, f"complex_weight_lh_{name}{suffix}") for name in ("1", "b1", "2", "b2")]
        re, im = complex_layer(x, *weights[:2])
        return complex_layer((F.relu(re), F.relu(im)), *weights[2:])

    def _scatter(self, image: Tensor) -> Tensor:
        low, (high,) = self.xfm(image)
        low = low * self.complex_weight_ll
        bands = high.unbind(-1)  # real and imaginary part, each (B, C, 6, H/2, W/2)
        if "channel" in self.mixing:
            blocks = tuple(part.movedim(1, -1).unflatten(-1, (4, -1)) for part in bands)
            bands = tuple(part.flatten(-2).movedim(-1, 1) for part in self._blend(blocks, ""))
        if "token" in self.mixing:
            bands = self._blend(bands, "_t")
        scattered = self.ifm((low, [torch.stack(bands, dim=-1)]))
        return scattered[..., : image.shape[2], : image.shape[3]]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        image = x.transpose(1, 2).unflatten(2, grid).float()
        with torch.autocast(x.device.type, enabled=False):
            if self.mixing == "channel_token":
                direct, scattered = image.chunk(2, dim=1)
                image = torch.stack([self.conv(direct), self._scatter(scattered)], dim=2).flatten(1, 2)
            else:
                image = self._scatter(image)
        return image.flatten(2).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """A 3x3 convolution of each channel over the (B, N, C) tokens' grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.dwconv(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    """Linear, (the depthwise convolution of the pyramid,) GELU, linear."""

    def __init__(self, dim: int, ratio: int, depthwise: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, ratio * dim)
        if depthwise:
            self.dwconv = DepthwiseConv(ratio * dim)
        self.fc2 = nn.Linear(ratio * dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.fc1(x)
        if hasattr(self, "dwconv"):
            x = self.dwconv(x, grid)
        return self.fc2(F.gelu(x))


class VanillaBlock(nn.Module):
    """The vanilla body's block; a spectral one has a single residual around mixer and MLP."""

    def __init__(self, dim: int, mixer: nn.Module) -> None:
        super().__init__()
        self.spectral = not isinstance(mixer, Attention)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.add_module("filter" if self.spectral else "attn", mixer)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4, depthwise=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.spectral:
            return x + self.mlp(self.norm2(self.filter(self.norm1(x), grid)), grid)
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x), grid)


class Vanilla(nn.Module):
    """Images (B, 3, S, S) to (B, classes); SpectFormer, section 3. `mixer(dim, grid)` stands in the first blocks."""

    def __init__(
        self,
        mixer: Callable[[int, tuple[int, int]], nn.Module],
        embed_dim: int,
        depth: int,
        num_heads: int,
        alpha: int = 4,
        img_size: int = 224,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.grid = (img_size // 16, img_size // 16)
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, embed_dim, 16, stride=16)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, self.grid[0] * self.grid[1], embed_dim))
        mixers = [mixer(embed_dim, self.grid) for _ in range(alpha)]
        mixers += [FusedAttention(embed_dim, num_heads) for _ in range(depth - alpha)]
        self.blocks = nn.ModuleList(VanillaBlock(embed_dim, mixer) for mixer in mixers)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, self.grid)
        return self.head(self.norm(x).mean(dim=1))


class Stem(nn.Module):
    """Convolutional patch embedding of stride 4: (B, 3, S, S) to tokens (B, S*S/16, C) and their grid."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, kernel, stride in ((3, 7, 2), (width, 3, 1), (width, 3, 1)):
            conv = nn.Conv2d(channels, width, kernel, stride, kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, dim, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(self.conv(x))
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


class Downsample(nn.Module):
    """Tokens and their grid to half the grid."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(dim, out, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(out)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        x = self.proj(x.transpose(1, 2).unflatten(2, grid))
        return self.norm(x.flatten(2).transpose(1, 2)), tuple(x.shape[2:])


class PyramidBlock(nn.Module):
    """Pre-norm residual pair of mixer and MLP."""

    def __init__(self, dim: int, ratio: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = mixer
        self.mlp = Mlp(dim, ratio, depthwise=True)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), grid)
        return x + self.mlp(self.norm2(x), grid)


class ClassBlock(nn.Module):
    """One block of class attention; only the class token, put in front of the (B, N, C) tokens, changes."""

    def __init__(self, dim: int, num_heads: int, ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads)
        self.mlp = Mlp(dim, ratio, depthwise=False)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        cls = x[:, :1] + self.attn(self.norm1(x), grid)
        cls = cls + self.mlp(self.norm2(cls), grid)
        return torch.cat([cls, x[:, 1:]], dim=1)


Box = tuple[int, int, int, int]


def swap_box(x: Tensor, box: Box) -> Tensor:
    """(B, H, W, C) with the box (x1, y1, x2, y2), x along W, taken from the batch in reverse order."""
    x1, y1, x2, y2 = box
    out = x.clone()
    out[:, y1:y2, x1:x2] = x.flip(0)[:, y1:y2, x1:x2]
    return out


class Pyramid(nn.Module):
    """The four-stage body of SpectFormer-H and SVT-H: images (B, 3, S, S) to (B, classes).

    `spectral_depths` says how many blocks of each stage have the family's own mixer, built by
    `mixer(dim, grid)`; the rest attend. With `token_label`, training takes a box of the last stage's grid and
    returns (class logits, token logits (B, N, classes), box); evaluation adds half the tokens' maximum.
    """

    def __init__(
        self,
        mixer: Callable[[int, tuple[int, int]], nn.Module],
        stem_width: int,
        dims: tuple[int, ...],
        num_heads: tuple[int, ...],
        depths: tuple[int, ...],
        spectral_depths: tuple[int, ...],
        mlp_ratios: tuple[int, ...] = (8, 8, 4, 4),
        img_size: int = 224,
        num_classes: int = 1000,
        token_label: bool = False,
    ) -> None:
        super().__init__()
        self.token_label = token_label
        for i, dim in enumerate(dims):
            size = img_size // (4 * 2**i)
            embed = Stem(stem_width, dim) if i == 0 else Downsample(dims[i - 1], dim)
            mixers = [
                mixer(dim, (size, size)) if j < spectral_depths[i] else Attention(dim, num_heads[i])
                for j in range(depths[i])
            ]
            self.add_module(f"patch_embed{i + 1}", embed)
            blocks = nn.ModuleList(PyramidBlock(dim, mlp_ratios[i], m) for m in mixers)
            self.add_module(f"block{i + 1}", blocks)
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.post_network = nn.ModuleList([ClassBlock(dims[-1], num_heads[-1], mlp_ratios[-1])])
        self.head = nn.Linear(dims[-1], num_classes)
        if token_label:
            self.aux_head = nn.Linear(dims[-1], num_classes)

    def forward_features(self, x: Tensor, box: Box | None) -> tuple[Tensor, tuple[int, int]]:
        """Normalised class token and last-stage tokens (B, 1 + N, C), and the tokens' grid."""
        x, grid = self.patch_embed1(x)
        if box is not None:
            x = swap_box(x.unflatten(1, grid), tuple(MIX_STRIDE * edge for edge in box)).flatten(1, 2)
        for stage in "1234":
            if stage != "1":
                x, grid = self.get_submodule(f"patch_embed{stage}")(x, grid)
            for block in self.get_submodule(f"block{stage}"):
                x = block(x, grid)
            if stage != "4":
                x = self.get_submodule(f"norm{stage}")(x)
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1)
        return self.norm4(self.post_network[0](x, grid)), grid

    def forward(self, x: Tensor, box: Box | None = None):
        tokens, grid = self.forward_features(x, box)
        logits = self.head(tokens[:, 0])
        if not self.token_label:
            return logits
        aux = self.aux_head(tokens[:, 1:])
        if not self.training:
            return logits + 0.5 * aux.amax(dim=1)
        if box is not None:
            aux = swap_box(aux.unflatten(1, grid), box).flatten(1, 2)
        return logits, aux, box


_VANILLA = {
    "ti": {"embed_dim": 256, "depth": 12, "num_heads": 4},
    "xs": {"embed_dim": 384, "depth": 12, "num_heads": 6},
    "s": {"embed_dim": 384, "depth": 19, "num_heads": 6},
    "b": {"embed_dim": 512, "depth": 19, "num_heads": 8},
}
_PYRAMID_FIELDS = ("stem_width", "dims", "num_heads", "depths")
_PYRAMID = {
    "s": (32, (64, 128, 320, 448), (2, 4, 10, 14), (3, 4, 6, 3)),
    "b": (64, (64, 128, 320, 512), (2, 4, 10, 16), (3, 4, 12, 3)),
    "l": (64, (96, 192, 384, 512), (3, 6, 12, 16), (3, 6, 18, 3)),
}


def _pyramid(size: str, mixer: Callable, alpha: int, **options: object) -> Pyramid:
    spec = dict(zip(_PYRAMID_FIELDS, _PYRAMID[size], strict=True))
    spectral_depths = tuple(depth if i < alpha else 0 for i, depth in enumerate(spec["depths"]))
    return Pyramid(mixer, **spec, spectral_depths=spectral_depths, **options)


def _svt_vanilla(size: str, *, mixing: str = "channel_token", **options: object) -> Vanilla:
    return Vanilla(partial(Scattering, mixing=mixing), **_VANILLA[size], **options)


def _svt(size: str, *, alpha: int = 1, mixing: str = "channel", **options: object) -> Pyramid:
    return _pyramid(size, partial(Scattering, mixing=mixing), alpha, **options)


BUILDERS: dict[str, Callable[..., nn.Module]] = {
    **{f"spectformer_{size}": partial(Vanilla, SpectralGate, **spec) for size, spec in _VANILLA.items()},
    **{f"spectformer_h_{size}": partial(_pyramid, size, SpectralGate, 2) for size in _PYRAMID},
    **{f"svt_h_{size}": partial(_svt, size) for size in _PYRAMID},
    **{f"svt_vanilla_{size}": partial(_svt_vanilla, size) for size in _VANILLA},
}


def create(name: str, **options: object) -> nn.Module:
    """The plain formulation of the model timm knows as `name`.

    Options: `img_size`, `num_classes`, `alpha`; `token_label` for the pyramids, `mixing` for SVT.

    Raises:
        KeyError: there is no plain formulation of that name.
    """
    return BUILDERS[name](**options)
