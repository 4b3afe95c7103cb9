"""What torch has no public name for. Without any of it the layers here still work, if more slowly."""

import torch
from torch import Tensor, nn

# The operations by which TorchInductor lets oneDNN convolve and activate in one pass, and multiply in float32.
_CONVOLUTION_POINTWISE = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_LINEAR_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_FUSED = (torch.float32, torch.bfloat16)
# Hooks decide what a layer computes (pruning, spectral norm) or who hears of it. They can be set and removed by public
# functions, but not asked for.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)


def are_hooked(layers: tuple[nn.Module, ...]) -> bool:
    """Whether somebody hooked one of the layers, or all modules there are; True where that cannot be told."""
    return any(getattr(nn.modules.module, name, True) for name in _GLOBAL_HOOKS) or any(
        getattr(layer, name, True) for layer in layers for name in _HOOKS
    )


def can_fuse(x: Tensor) -> bool:
    """Whether `convolve_and_activate` takes x."""
    return _CONVOLUTION_POINTWISE is not None and torch.backends.mkldnn.is_available() and x.dtype in _FUSED


def convolve_and_activate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of a depthwise 3x3 convolution that keeps the grid, of (B, C, H, W)."""
    ones = [1, 1]  # padding, stride and dilation
    return _CONVOLUTION_POINTWISE(x, weight, bias, ones, ones, ones, len(weight), "gelu", [], "none")


def product(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """(n, k) times (k, m): in float32 oneDNN's own result, faster than MKL's on AMD processors, else `out`, written."""
    if _LINEAR_POINTWISE is None or rows.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return torch.mm(rows, matrix, out=out)
    return _LINEAR_POINTWISE(rows, matrix.T, None, "none", [], "")
