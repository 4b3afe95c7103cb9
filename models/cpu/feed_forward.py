"""The feed-forward network in slices of a few images."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .. import layers
from .private import can_fuse, convolve_and_activate
from .slicing import images_per_slice, may_slice, run

# Entries of a hidden tensor computed together: 16 MiB in float32, measured best of 4 to 32.
SLICE_ELEMENTS = 2**22


@register_notrace_module  # by timm's tracer, so that it stays as fast in a graph
class FeedForward(layers.FeedForward):
    """`layers.FeedForward`, in slices where that may be, in the weights' own precision."""

    def forward(self, x: Tensor) -> Tensor:
        fc1, dwconv, act, fc2 = self.fc1, self.dwconv, self.act, self.fc2
        if _are_as_built(fc1, dwconv, act, fc2) and not torch.is_autocast_enabled("cpu"):
            depthwise = (None, None) if dwconv is None else (dwconv.weight, dwconv.bias)
            weights = (fc1.weight, fc1.bias, *depthwise, fc2.weight, fc2.bias)
            if may_slice(x, weights, tuple(self.children())):
                return run(FeedForwardInSlices, x, *weights)
        return super().forward(x)


def _are_as_built(fc1: nn.Module, dwconv: nn.Module | None, act: nn.Module, fc2: nn.Module) -> bool:
    """Whether these are the layers that `layers.FeedForward` has, and nobody put another in the place of one."""
    return (
        type(fc1) is type(fc2) is nn.Linear
        and fc1.bias is not None
        and fc2.bias is not None
        and (dwconv is None or _is_depthwise(dwconv))
        and type(act) is nn.GELU
        and act.approximate == "none"
    )


def _is_depthwise(layer: nn.Module) -> bool:
    """Whether this is a depthwise 3x3 convolution that keeps the grid."""
    return (
        type(layer) is nn.Conv2d
        and layer.kernel_size == (3, 3)
        and layer.stride == layer.padding == layer.dilation == (1, 1)
        and layer.groups == layer.in_channels == layer.out_channels
        and layer.padding_mode == "zeros"
        and layer.bias is not None
    )


class FeedForwardInSlices(torch.autograd.Function):
    """The layers of `FeedForward`, all as convolutions over channels-last views.

    Gives the new grid and, where there may be a backward pass (`keep`), what it needs. Of the hidden tensors, the
    largest of the network, the convolution's output and its GELU are computed anew there; without a convolution
    there is one less, and both are kept.
    """

    generate_vmap_rule = True  # torch.func wants one even where none of the tensors is transformed

    @staticmethod
    def forward(grid, keep, weight1, bias1, depthwise, depthwise_bias, weight2, bias2):
        x = grid.contiguous().permute(0, 3, 1, 2)
        weight1, weight2 = weight1[..., None, None], weight2[..., None, None]
        y = grid.new_empty(*grid.shape[:3], len(weight2)).permute(0, 3, 1, 2)
        size = _images_per_slice(x, len(weight1), keep, depthwise)
        kept = []
        for part, out in zip(x.split(size), y.split(size), strict=True):
            h = F.conv2d(part, weight1, bias1)
            if depthwise is None:
                activated = F.gelu(h)
            elif not keep and can_fuse(h):
                activated = convolve_and_activate(h, depthwise, depthwise_bias)
            else:
                activated = torch.ops.aten.gelu_(_convolve(h, depthwise, depthwise_bias))
            if keep:
                kept += [h, activated] if depthwise is None else [h]
            out.copy_(F.conv2d(activated, weight2, bias2))
        return y.permute(0, 2, 3, 1), *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        grid, _, weight1, _, depthwise, depthwise_bias, weight2, _ = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(grid, weight1, depthwise, depthwise_bias, weight2, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        grid, weight1, depthwise, depthwise_bias, weight2, *saved = ctx.saved_tensors
        weight1, weight2 = weight1[..., None, None], weight2[..., None, None]
        x, grad = grid.contiguous().permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
        grad_x = torch.empty_like(x)
        size = _images_per_slice(x, len(weight1), True, depthwise)
        kept = iter(saved)
        total: list[Tensor] = []
        for part, g, out in zip(x.split(size), grad.split(size), grad_x.split(size), strict=True):
            h = u = next(kept)
            if depthwise is None:
                activated = next(kept)
            else:
                u = _convolve(h, depthwise, depthwise_bias)
                activated = F.gelu(u)
            g, *grads2 = _convolution_backward(g, activated, weight2)
            g = torch.ops.aten.gelu_backward(g, u)
            grads_depthwise = []
            if depthwise is not None:
                g, *grads_depthwise = _convolution_backward(g, h, depthwise)
            g, *grads1 = _convolution_backward(g, part, weight1)
            out.copy_(g)
            grads = [*grads1, *grads_depthwise, *grads2]
            total = [sum_.add_(new) for sum_, new in zip(total, grads, strict=True)] if total else grads
        grad_weight1, grad_bias1, *grads_depthwise, grad_weight2, grad_bias2 = total
        return (
            grad_x.permute(0, 2, 3, 1),
            None,
            grad_weight1.flatten(1),
            grad_bias1,
            *(grads_depthwise or (None, None)),
            grad_weight2.flatten(1),
            grad_bias2,
        )


def _images_per_slice(x: Tensor, hidden_dim: int, keep: bool, depthwise: Tensor | None) -> int:
    # Where all hidden tensors are kept anyway, twice as much at a time is faster.
    most = 2 * SLICE_ELEMENTS if keep and depthwise is None else SLICE_ELEMENTS
    return images_per_slice(len(x), hidden_dim * x.shape[2] * x.shape[3], most)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=len(weight))


def _convolution_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, weight and bias of a pointwise or depthwise convolution that keeps the grid."""
    groups = x.shape[1] // weight.shape[1]
    padding = [weight.shape[2] // 2] * 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], groups, [True] * 3
    )
