"""The feed-forward network, a few images at a time."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import to_autocast
from .kernels import empty_gradients, images_per_slice, in_slices, kernel, may_run, register_gradients

# Elements of a hidden tensor per slice, in inference with a convolution: 8 MiB in float32, the fastest of 4 to 32 MiB.
# Training uses twice as many, and networks without a convolution twice as many again.
SLICE_ELEMENTS = 2**21
# TorchInductor's operators for oneDNN's fused convolution and activation, and for its float32 products. They are
# private; the kernel is slower without them.
_CONVOLUTION_POINTWISE = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)
_LINEAR_POINTWISE = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def feed_forward(layer: nn.Module, x: Tensor) -> Tensor | None:
    """Compute `layers.FeedForward` on (B, H, W, C); return None if the kernel cannot run."""
    if not all(map(_is_known, layer.children())):
        return None
    weighted = [layer.fc1, layer.fc2] if layer.dwconv is None else [layer.fc1, layer.dwconv, layer.fc2]
    weights = [weight for part in weighted for weight in (part.weight, part.bias)]
    if not may_run(x, weights, tuple(layer.children())):
        return None
    return feed_forward_in_slices([to_autocast(x), *weights], torch.is_grad_enabled())[0]


def _is_known(layer: nn.Module) -> bool:
    """Return whether a layer is one of those that `layers.FeedForward` creates, and was not replaced."""
    if type(layer) is nn.Conv2d:
        geometry = layer.kernel_size, layer.padding, layer.padding_mode, layer.stride, layer.dilation, layer.groups
        return geometry == ((3, 3), (1, 1), "zeros", (1, 1), (1, 1), layer.out_channels) and layer.bias is not None
    if type(layer) is nn.GELU:
        return layer.approximate == "none"
    return type(layer) is nn.Linear and layer.bias is not None


def general_feed_forward(x: Tensor, *weights: Tensor) -> Tensor:
    """Apply linear, (depthwise 3x3 convolution,) GELU, linear to (B, H, W, C), in the dtype of x.

    `weights` are the weights and biases of these layers, in order.
    """
    weight1, bias1, *depthwise, weight2, bias2 = (weight.to(x.dtype) for weight in weights)
    hidden = F.linear(x, weight1, bias1)
    if depthwise:
        hidden = _convolve(hidden, *depthwise)
    return F.linear(F.gelu(hidden), weight2, bias2)


@kernel("feed_forward")
def feed_forward_in_slices(inputs: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `general_feed_forward`; with `keep`, also return what the backward pass needs, else empty tensors.

    It needs the hidden tensor and, without a convolution, its GELU. The backward pass recomputes the convolution's
    output and its GELU, because hidden tensors are the largest of the network.
    """
    x, *weights = inputs
    weight1, bias1, *depthwise, weight2, bias2 = (weight.to(x.dtype) for weight in weights)
    y, hidden, activated = _empty_results(inputs, keep)
    pieces = _in_slices(len(weight1), keep, bool(depthwise), x.contiguous(), y, hidden, activated)
    for part, out, kept, kept_activated in pieces:
        if keep:  # write the product directly into the kept tensor
            h = kept
            torch.addmm(bias1, _rows(part), weight1.T, out=_rows(h))
        else:
            h = _linear(part, weight1, bias1)
        if not depthwise:
            a = torch.ops.aten.gelu.out(h, out=kept_activated if keep else h)
        elif _can_fuse(h):
            a = _convolve_and_activate(h, *depthwise)
        else:
            a = F.gelu(_convolve(h, *depthwise))
        out.copy_(_linear(a, weight2, bias2))
    return y, hidden, activated


@feed_forward_in_slices.register_fake
def _empty_results(inputs, keep):
    x, weight1, _bias1, *depthwise, weight2, _bias2 = inputs
    hidden = (*x.shape[:3], len(weight1))
    sizes = (*x.shape[:3], len(weight2)), hidden if keep else (0,), hidden if keep and not depthwise else (0,)
    return tuple(x.new_empty(size) for size in sizes)


@kernel("feed_forward_backward")
def feed_forward_backward(grad: Tensor, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute the gradients of the inputs; those of weights accumulate in the weights' precision."""
    hidden, activated = results
    x, *weights = inputs
    weight1, _bias1, *depthwise, weight2, _bias2 = (weight.to(x.dtype) for weight in weights)
    grads = empty_gradients(inputs)
    grad_x, *totals = grads
    grad_weight1, grad_bias1, *grad_depthwise, grad_weight2, grad_bias2 = (total.zero_() for total in totals)
    scratch = x.new_empty(0)
    pieces = _in_slices(
        len(weight1), True, bool(depthwise), x.contiguous(), hidden, activated, grad.contiguous(), grad_x
    )
    for part, h, a, g, out in pieces:
        before_gelu = h
        if depthwise:
            before_gelu = _convolve(h, *depthwise)
            a = torch.ops.aten.gelu.out(before_gelu, out=scratch.resize_(h.shape))  # overwritten by grad_h below
        grad_weight2 += (_rows(a).T @ _rows(g)).T  # faster than the transposed product
        grad_bias2 += _rows(g).sum(0)
        grad_h = _product(_rows(g), weight2, _rows(scratch.resize_(h.shape))).view(h.shape)
        torch.ops.aten.gelu_backward.grad_input(grad_h, before_gelu, grad_input=grad_h)
        if depthwise:
            grad_h, *new = _convolution_backward(grad_h, h, depthwise[0])
            for total, addend in zip(grad_depthwise, new, strict=True):
                total += addend
        grad_weight1 += _rows(grad_h).T @ _rows(part)
        grad_bias1 += _rows(grad_h).sum(0)
        rows = _rows(out)
        rows.copy_(_product(_rows(grad_h), weight1, rows))
    return grads


register_gradients(feed_forward_in_slices, feed_forward_backward, general_feed_forward, further=2)


def _in_slices(hidden_dim: int, training: bool, depthwise: bool, *grids: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield grids (B, H, W, C) for a few images at a time."""
    batch, height, width, _ = grids[0].shape
    most = SLICE_ELEMENTS * (2 if training else 1) * (1 if depthwise else 2)
    return in_slices(images_per_slice(batch, hidden_dim * height * width, most), *grids)


def _rows(grid: Tensor) -> Tensor:
    """View (B, H, W, C) as a matrix (B * H * W, C)."""
    return grid.view(-1, grid.shape[3])


def _channels_first(grid: Tensor) -> Tensor:
    return grid.permute(0, 3, 1, 2)


def _channels_last(grid: Tensor) -> Tensor:
    return grid.permute(0, 2, 3, 1)


def _can_fuse(x: Tensor) -> bool:
    """Return whether oneDNN fuses convolution and activation for x."""
    fused = x.dtype in (torch.float32, torch.bfloat16)
    return fused and _CONVOLUTION_POINTWISE is not None and torch.backends.mkldnn.is_available()


def _convolve_and_activate(grid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply `_convolve` and GELU."""
    ones = [1, 1]  # padding, stride and dilation
    arguments = (weight, bias, ones, ones, ones, len(weight), "gelu", [], "none")
    return _channels_last(_CONVOLUTION_POINTWISE(_channels_first(grid), *arguments))


def _product(rows: Tensor, matrix: Tensor, out: Tensor) -> Tensor:
    """Multiply (n, k) by (k, m): into `out`, or in float32 by oneDNN, which is faster than MKL on AMD CPUs."""
    if _LINEAR_POINTWISE is None or rows.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return torch.mm(rows, matrix, out=out)
    return _LINEAR_POINTWISE(rows, matrix.T, None, "none", [], "")


def _linear(grid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a linear layer to (B, H, W, C) as a pointwise convolution, in which oneDNN fuses the bias."""
    return _channels_last(F.conv2d(_channels_first(grid), weight[..., None, None], bias))


def _convolve(grid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a depthwise 3x3 convolution that preserves the size of the grid (B, H, W, C)."""
    return _channels_last(F.conv2d(_channels_first(grid), weight, bias, padding=1, groups=len(weight)))


def _convolution_backward(grad: Tensor, grid: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of `_convolve`'s arguments."""
    channels, ones = len(weight), [1, 1]  # stride, padding and dilation
    grad, grid = _channels_first(grad), _channels_first(grid)
    grad_grid, *others = torch.ops.aten.convolution_backward(
        grad, grid, weight, [channels], ones, ones, ones, False, [0, 0], channels, [True] * 3
    )
    return _channels_last(grad_grid), *others
