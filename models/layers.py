"""Layers shared by the two families. Every block and mixer maps a token grid (B, H, W, C) to (B, H, W, C)."""

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

# torch.fx must not trace these. It looks wrapped functions up in the module that calls them.
torch.fx.wrap("full_precision")
torch.fx.wrap("to_autocast")

SPECTRAL_PRECISIONS = ("half", "float32")  # the default first


class GridMixer(nn.Module):
    """Base class of mixers whose weights depend on the size (H, W) of the token grid, `grid_size`.

    `spectral_precision` sets the precision under autocast: "half" computes in autocast's dtype and accumulates products
    in float32, "float32" computes in float32. Every subclass has a static method `resize_weight(name, weight, grid)`,
    which resamples a weight to another (H, W), or returns it unchanged if it does not depend on the grid.
    """

    grid_size: Grid
    spectral_precision = SPECTRAL_PRECISIONS[0]

    def spectral_input(self, x: Tensor) -> Tensor:
        """Cast the tokens to the precision of the computation; float64 stays float64."""
        return to_autocast(x) if self.spectral_precision == "half" else full_precision(x)

    @torch.no_grad()
    def set_grid_size(self, grid_size: Grid) -> None:
        """Replace all weights that depend on the grid by ones resampled to another (H, W)."""
        for name, weight in list(self.named_parameters()):
            resized = self.resize_weight(name, weight, grid_size)
            if resized is not weight:
                owner, _, leaf = name.rpartition(".")
                setattr(self.get_submodule(owner), leaf, nn.Parameter(resized, weight.requires_grad))
        self.grid_size = grid_size


def set_spectral_precision(model: nn.Module, precision: str) -> None:
    """Set the precision of all spectral mixers in a model, one of SPECTRAL_PRECISIONS, see `GridMixer`.

    Raises:
        ValueError: if the precision is unknown.
    """
    if precision not in SPECTRAL_PRECISIONS:
        raise ValueError(f"spectral_precision must be one of {', '.join(SPECTRAL_PRECISIONS)}, not {precision!r}")
    for module in model.modules():
        if isinstance(module, GridMixer):
            module.spectral_precision = precision


class LayerNorm(nn.LayerNorm):
    """Layer norm over channels. It stays in half precision under autocast, since sums are in float32 anyway.

    PyTorch's autocast on CUDA casts the input to float32 and the output back, which moves more memory than the norm
    itself. `timm.layers.set_fast_norm` serves the same purpose.
    """

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(to_autocast(x), self.normalized_shape, self.weight, self.bias, self.eps)


class FinalNorm(nn.LayerNorm):
    """The norm before pooling, in float32 under autocast: with bf16 the loss deviates three times as much."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(full_precision_in_autocast(x), self.normalized_shape, self.weight, self.bias, self.eps)


@torch.fx.wrap
def layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`F.layer_norm` in the dtype of x."""
    with autocast_off(x):
        return F.layer_norm(x, shape, weight.to(x.dtype), bias.to(x.dtype), eps)


@torch.fx.wrap
def full_precision_in_autocast(x: Tensor) -> Tensor:
    """Cast a half-precision tensor to float32 if autocast is on."""
    return full_precision(x) if autocast_enabled(x) else x


class Attention(nn.Module):
    """Multi-head self-attention over all tokens of a (B, H, W, C) grid.

    A single linear layer with bias computes queries, keys and values; the scale is head_dim ** -0.5. After
    `timm.layers.set_fused_attn(False)`, the attention map passes through the identity `attn_drop`, so that
    `timm.utils.AttentionExtract` can read it.
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
        # Unbind before transposing to (B, heads, N, head_dim), so that the backward pass copies only once.
        q, k, v = qkv.unbind(2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        return (self.attn_drop(attention_map(q, k)) @ v).transpose(1, 2)


def attention_map(q: Tensor, k: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(head_dim)), the attention weights (..., queries, N)."""
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


class ClassAttention(nn.Module):
    """Attention with the first token of a (B, 1 + N, C) sequence as the only query; returns that token, (B, 1, C)."""

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
    """Return the number of heads; raise ValueError if it does not divide the width or is less than 1."""
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must be a divisor of the width {dim}, not {num_heads}")
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
            x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels_last views, no copies
        return self.fc2(self.act(x))


class Block(nn.Module):
    """Pre-norm residual pair: x + mixer(norm1(x)), then x + mlp(norm2(x)).

    With `grad_checkpointing`, the backward pass recomputes the block's activations.
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
    """One residual connection around mixer and MLP: x + mlp(norm2(mixer(norm1(x))))."""

    def residuals(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.mlp(self.norm2(self.mixer(self.norm1(x)))))


class ClassBlock(nn.Module):
    """Prepends the mean of a (B, N, C) sequence as its class token and refines it: (B, 1 + N, C).

    Both residual branches, class attention and MLP, update only the class token.
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
    """Embedding of non-overlapping patches: images (B, 3, H, W) to a contiguous grid (B, H // size, W // size, C)."""

    def __init__(self, in_chans: int, dim: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1).contiguous()


class Stem(nn.Module):
    """Convolutional stem: images (B, 3, H, W) to a grid (B, ceil(H / stride), ceil(W / stride), dim).

    With stride 4, the first and the last convolution have stride 2. With stride 2, only the first has.

    Raises:
        ValueError: if the stride is not 1, 2 or 4.
    """

    def __init__(self, in_chans: int, width: int, dim: int, stride: int = 4):
        super().__init__()
        if stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 1, 2 or 4, not {stride!r}")
        first_stride = min(stride, 2)
        layers: list[nn.Module] = []
        for source, kernel, step in ((in_chans, 7, first_stride), (width, 3, 1), (width, 3, 1)):
            conv = nn.Conv2d(source, width, kernel, step, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*layers)
        self.proj = nn.Conv2d(width, dim, 3, stride=stride // first_stride, padding=1)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        # channels_last makes the grid below a view of the convolution's output. vmap supports this way of writing it.
        x = self.conv(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class Downsample(nn.Module):
    """Downsampling between stages: (B, H, W, C) to (B, ceil(H / 2), ceil(W / 2), dim_out)."""

    def __init__(self, dim: int, dim_out: int):
        super().__init__()
        self.proj = nn.Conv2d(dim, dim_out, 3, stride=2, padding=1)
        self.norm = LayerNorm(dim_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def init_linear(module: nn.Module) -> None:
    """Initialize linear layers (for `Module.apply`): weights truncated normal with std 0.02, biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def init_conv(module: nn.Module) -> None:
    """Initialize convolutions (for `Module.apply`): weights normal with std sqrt(2 / fan_out), biases 0."""
    if isinstance(module, nn.Conv2d):
        fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
