"""The feed-forward halves of the blocks: two linear layers around GELU, in the pyramids with a convolution."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .slicing import images_a_slice, may_slice

# Entries of a hidden tensor computed together on a CPU: 16 MiB in float32, measured best of 4 to 32.
SLICE_ELEMENTS = 2**22

_CONVOLUTION_POINTWISE = getattr(torch.ops.mkldnn, "_convolution_pointwise", None)  # not public


class FeedForward(nn.Module):
    """Linear, (depthwise 3x3 convolution over the grid,) GELU, linear: (B, H, W, C) to (B, H, W, C)."""

    def __init__(self, dim: int, hidden_dim: int, depthwise: bool = False):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.dwconv = nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, groups=hidden_dim) if depthwise else None
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self._runs_in_slices(x):
            depthwise = (None, None) if self.dwconv is None else (self.dwconv.weight, self.dwconv.bias)
            weights = (self.fc1.weight, self.fc1.bias, *depthwise, self.fc2.weight, self.fc2.bias)
            return _InSlices.apply(x, torch.is_grad_enabled(), *weights)
        x = self.fc1(x)
        if self.dwconv is not None:
            x = self.dwconv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels_last views: no copies
        return self.fc2(self.act(x))

    def _runs_in_slices(self, x: Tensor) -> bool:
        """Where that may be, in the weights' own precision, unless somebody put another layer in the place of one."""
        return (
            may_slice(x, *self.children())
            and not torch.is_autocast_enabled("cpu")
            and x.dtype == self.fc1.weight.dtype
            and all(type(layer) in (nn.Linear, nn.Conv2d, nn.GELU) for layer in self.children())
            and self.act.approximate == "none"
        )


class _InSlices(torch.autograd.Function):
    """The layers of `FeedForward`, all as convolutions over channels-last views; see `slicing`.

    Of the hidden tensors, the largest of the network, the convolution's output and its GELU are computed anew in
    the backward pass; without a convolution there is one less, and both are kept.
    """

    @staticmethod
    def forward(ctx, grid, keep, weight1, bias1, depthwise, depthwise_bias, weight2, bias2):
        x = grid.contiguous().permute(0, 3, 1, 2)
        weight1, weight2 = weight1[..., None, None], weight2[..., None, None]
        # Where all hidden tensors are kept anyway, twice as much at a time is faster.
        most = 2 * SLICE_ELEMENTS if keep and depthwise is None else SLICE_ELEMENTS
        size = images_a_slice(len(x), len(weight1) * x.shape[2] * x.shape[3], most)
        y = grid.new_empty(*grid.shape[:3], len(weight2)).permute(0, 3, 1, 2)
        kept = []
        for part, out in zip(x.split(size), y.split(size), strict=True):
            h = F.conv2d(part, weight1, bias1)
            if depthwise is None:
                activated = F.gelu(h)
            elif not keep and _can_fuse(h):
                activated = _convolve_and_activate(h, depthwise, depthwise_bias)
            else:
                activated = torch.ops.aten.gelu_(_convolve(h, depthwise, depthwise_bias))
            if keep:
                kept += [h, activated] if depthwise is None else [h]
            out.copy_(F.conv2d(activated, weight2, bias2))
        ctx.size = size
        ctx.save_for_backward(x, weight1, depthwise, depthwise_bias, weight2, *kept)
        return y.permute(0, 2, 3, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight1, depthwise, depthwise_bias, weight2, *saved = ctx.saved_tensors
        kept = iter(saved)
        gradient = gradient.permute(0, 3, 1, 2)
        x_gradient = torch.empty_like(x)
        total: list[Tensor] = []
        parts = (tensor.split(ctx.size) for tensor in (x, gradient, x_gradient))
        for part, g, out in zip(*parts, strict=True):
            h = u = next(kept)
            if depthwise is None:
                activated = next(kept)
            else:
                u = _convolve(h, depthwise, depthwise_bias)
                activated = F.gelu(u)
            g, *of_layer2 = _convolution_backward(g, activated, weight2)
            g = torch.ops.aten.gelu_backward(g, u)
            of_depthwise = []
            if depthwise is not None:
                g, *of_depthwise = _convolution_backward(g, h, depthwise)
            g, *of_layer1 = _convolution_backward(g, part, weight1)
            out.copy_(g)
            gradients = [*of_layer1, *of_depthwise, *of_layer2]
            total = [sum_.add_(new) for sum_, new in zip(total, gradients, strict=True)] if total else gradients
        weight1_gradient, bias1_gradient, *between, weight2_gradient, bias2_gradient = total
        return (
            x_gradient.permute(0, 2, 3, 1),
            None,
            weight1_gradient.flatten(1),
            bias1_gradient,
            *(between or (None, None)),
            weight2_gradient.flatten(1),
            bias2_gradient,
        )


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=1, groups=len(weight))


def _can_fuse(x: Tensor) -> bool:
    """Whether oneDNN convolves and activates in one pass, by the operation that TorchInductor uses."""
    return x.dtype == torch.float32 and _CONVOLUTION_POINTWISE is not None


def _convolve_and_activate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    ones = [1, 1]  # padding, stride and dilation
    return _CONVOLUTION_POINTWISE(x, weight, bias, ones, ones, ones, len(weight), "gelu", [], "none")


def _convolution_backward(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the input, weight and bias of a pointwise or depthwise convolution that keeps the grid."""
    groups = x.shape[1] // weight.shape[1]
    padding = [weight.shape[2] // 2] * 2
    return torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], [1, 1], padding, [1, 1], False, [0, 0], groups, [True] * 3
    )
