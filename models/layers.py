"""Layers the two families share. Every block and mixer maps a token grid (B, H, W, C) to (B, H, W, C)."""

import math

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_, use_fused_attn
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .cpu.attention import attend
from .cpu.feed_forward import feed_forward
from .precision import autocast_enabled, autocast_off, full_precision, to_autocast
from .resampling import Grid

# torch.fx must not look into these. It finds wrapped functions by the module that calls them.
torch.fx.wrap("full_precision")
torch.fx.wrap("to_autocast")

SPECTRAL_PRECISIONS = ("half", "float32")  # the default first


class GridMixer(nn.Module):
    """Base of the mixers whose weights depend on the (H, W) of the token grid, `grid_size`.

    `spectral_precision` is the precision under autocast: "half", autocast's, with products that add up in float32, or
    "float32" throughout. Each mixer has a static method `resize_weights(weights, grid)`: its weights by name, those
    that depend on the grid resampled to another one. It ignores names it does not know; loading reports them.
    """

    grid_size: Grid
    spectral_precision = SPECTRAL_PRECISIONS[0]

    def spectral_input(self, x: Tensor) -> Tensor:
        """The tokens in the precision to compute in; float64 as they are."""
        return to_autocast(x) if self.spectral_precision == "half" else full_precision(x)

    @torch.no_grad()
    def set_grid_size(self, grid_size: Grid) -> None:
        """Resample all weights that depend on the grid to another (H, W) for good."""
        old = dict(self.named_parameters())
        for name, weight in self.resize_weights(old, grid_size).items():
            if weight is not old[name]:
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, nn.Parameter(weight, old[name].requires_grad))
        self.grid_size = grid_size


def set_spectral_precision(model: nn.Module, precision: str) -> None:
    """Choose the precision of all spectral mixers in a model, one of SPECTRAL_PRECISIONS, see `GridMixer`.

    Raises:
        ValueError: there is no such precision.
    """
    if precision not in SPECTRAL_PRECISIONS:
        raise ValueError(f"spectral_precision is one of {', '.join(SPECTRAL_PRECISIONS)}, not {precision!r}")
    for module in model.modules():
        if isinstance(module, GridMixer):
            module.spectral_precision = precision


class LayerNorm(nn.LayerNorm):
    """Layer norm over channels. Under autocast in half precision: sums are in float32 anyway.

    PyTorch's autocast on CUDA casts the input to float32 and the output back, which moves more memory than the norm
    itself; timm has `timm.layers.set_fast_norm` against it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(to_autocast(x), self.normalized_shape, self.weight, self.bias, self.eps)


class FinalNorm(nn.LayerNorm):
    """The norm before pooling and classifier, under autocast in float32: in bf16 the loss strays three times as far."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(full_precision_in_autocast(x), self.normalized_shape, self.weight, self.bias, self.eps)


@torch.fx.wrap
def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` in the dtype of x."""
    with autocast_off(x):
        return F.layer_norm(x, shape, weight.to(x.dtype), bias.to(x.dtype), eps)


@torch.fx.wrap
def full_precision_in_autocast(x: Tensor) -> Tensor:
    """A half-precision tensor as float32 where autocast is on."""
    return full_precision(x) if autocast_enabled(x) else x


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a (B, H, W, C) grid.

    One biased linear makes queries, keys and values; the scale is head_dim ** -0.5. After
    `timm.layers.set_fused_attn(False)` the attention map passes through `attn_drop`, an identity where
    `timm.utils.AttentionExtract` finds it.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = check_heads(dim, num_heads)
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attn_drop = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        qkv = self.qkv(x).view(batch, height * width, 3, self.num_heads, dim // self.num_heads)
        return self.proj(self.attend(qkv).reshape(batch, height, width, dim))

    def attend(self, qkv: Tensor) -> Tensor:
        """(B, N, 3, heads, head_dim) to (B, N, heads, head_dim)."""
        if self.fused_attn and (x := attend(qkv)) is not None:
            return x
        # Unbound before they are transposed to (B, heads, N, head_dim): the backward pass then copies once.
        q, k, v = qkv.unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return (self.attn_drop(attention_map(q, k)) @ v).transpose(1, 2)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)): of each query how much it takes of each value, (..., queries, N)."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


class ClassAttention(nn.Module):
    """Attention in which only the first token of a (B, 1 + N, C) sequence is a query; returns it, (B, 1, C)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = check_heads(dim, num_heads)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.attn_drop = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q = self.q(x[:, :1]).view(batch, 1, self.num_heads, -1).transpose(1, 2)
        k, v = self.kv(x).view(batch, length, 2, self.num_heads, -1).unbind(2)
        x = self.attn_drop(attention_map(q, k.transpose(1, 2))) @ v.transpose(1, 2)
        return self.proj(x.transpose(1, 2).reshape(batch, 1, dim))


def check_heads(dim: int, num_heads: int) -> int:
    """The number of heads.

    Raises:
        ValueError: it does not divide the width, or is none.
    """
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"width {dim} is not divisible into {num_heads} heads")
    return num_heads


class FeedForward(nn.Module):
    """Linear, (depthwise 3x3 convolution over the grid,) GELU, linear: (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int, depthwise: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim) if depthwise else None
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if (y := feed_forward(self, x)) is not None:
            return y
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels_last views: no copies
        return self.fc2(self.act(x))


class Block(nn.Module):
    """Pre-norm residual pair: x + mixer(norm1(x)), then x + mlp(norm2(x)).

    With `grad_checkpointing` its activations are computed again in the backward pass.
    """

    grad_checkpointing = False

    def __init__(self, dim: int, mixer: nn.Module, mlp: nn.Module, drop_path: float):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.residuals, x, use_reentrant=False)
        return self.residuals(x)

    def residuals(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.mixer(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SpectralBlock(Block):
    """One residual around both: x + mlp(norm2(mixer(norm1(x))))."""

    def residuals(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.mixer(self.norm1(x)))))


class ClassBlock(nn.Module):
    """Puts the mean token in front of a (B, N, C) sequence and refines it: (B, 1 + N, C).

    Both residuals, class attention and MLP, act on the class token alone.
    """

    def __init__(self, dim: int, num_heads: int, mlp: nn.Module):
        super().__init__()
        self.norm1 = LayerNorm(dim, eps=1e-6)
        self.attn = ClassAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps=1e-6)
        self.mlp = mlp

    def forward(self, tokens: Tensor) -> Tensor:
        sequence = torch.cat((tokens.mean(1, keepdim=True), tokens), 1)
        token = sequence[:, :1] + self.attn(self.norm1(sequence))
        token = token + self.mlp(self.norm2(token)[:, None])[:, 0]
        return torch.cat((token, tokens), 1)


class PatchEmbed(nn.Module):
    """Non-overlapping patches: images (B, 3, H, W) to a contiguous grid (B, H // size, W // size, C)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class Stem(nn.Module):
    """Convolutional stem: images (B, 3, H, W) to a grid (B, ceil(H / stride), ceil(W / stride), dim).

    A stride of 4 is 2 in the first convolution and 2 in the last; 2 is the first's alone.

    Raises:
        ValueError: the stride is none of 1, 2 and 4.
    """

    def __init__(self, in_chans: int, width: int, dim: int, stride: int = 4):
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"the stem's stride is 1, 2 or 4, not {stride!r}")
        first_stride = min(stride, 2)
        layers: list[nn.Module] = []
        for source, kernel, step in ((in_chans, 7, first_stride), (width, 3, 1), (width, 3, 1)):
            conv = nn.Conv2d(source, width, kernel, step, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, dim, 3, stride=stride // first_stride, padding=1)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        # In channels_last, written so that vmap takes it, the grid below is a view of the convolution's output.
        x = self.conv(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Between stages: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), dim_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def init_linear(module: nn.Module) -> None:
    """For `Module.apply`: linear weights truncated normal (std 0.02), biases 0. Norms start at 1 and 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_conv(module: nn.Module) -> None:
    """For `Module.apply`: convolutions normal with std sqrt(2 / fan_out), biases 0."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def format_grid(x: Tensor, output_fmt: str) -> Tensor:
    """A grid (B, H, W, C) as "NCHW", "NHWC" or a sequence "NLC".

    Raises:
        ValueError: it is none of these.
    """
    if output_fmt == "NCHW":
        return x.permute(0, 3, 1, 2).contiguous()
    if output_fmt not in ("NHWC", "NLC"):
        raise ValueError(f"output_fmt is NCHW, NHWC or NLC, not {output_fmt!r}")
    return x if output_fmt == "NHWC" else x.flatten(1, 2)
