"""Layers as other runtimes compute them fast: without a Fourier transform, and few grids transposed."""

import copy

import torch
from torch import Tensor, nn

from models.fourier_matrices import fourier_matrices
from models.layers import FeedForward
from models.spectral_gate import SpectralGate


class FourierProducts(nn.Module):
    """What a `SpectralGate` computes, (B, H, W, C) to (B, H, W, C), by two real matrix products each way.

    The axes are transformed one after the other; complex numbers are their real parts followed by their imaginary
    ones. For grids of one size the matrices are constants, with `dynamic` they follow from the grid.
    """

    def __init__(self, gate: SpectralGate, dynamic: bool):
        super().__init__()
        self.gate = gate
        self.dynamic = dynamic
        if not dynamic:
            for name, matrix in fourier_matrices(gate.grid_size).items():
                self.register_buffer(name, matrix)

    def forward(self, x: Tensor) -> Tensor:
        height, width, channels = x.shape[1:]
        frequencies = width // 2 + 1
        if self.dynamic:
            matrices = fourier_matrices((height, width))
            weight = self.gate.resize_weights({"complex_weight": self.gate.complex_weight}, (height, width))
            weight = weight["complex_weight"]
        else:
            matrices, weight = dict(self.named_buffers(recurse=False)), self.gate.complex_weight
        weight_real, weight_imaginary = weight.unbind(-1)  # each (H, W // 2 + 1, C)

        y = matrices["columns"] @ x  # (B, H, 2 * frequencies, C)
        y = y.unflatten(2, (2, frequencies)).transpose(1, 2).flatten(3).flatten(1, 2)
        y = (matrices["rows"] @ y).unflatten(1, (2, height)).unflatten(3, (frequencies, channels))
        real, imaginary = y.unbind(1)
        filtered = (
            real * weight_real - imaginary * weight_imaginary,
            real * weight_imaginary + imaginary * weight_real,
        )
        y = matrices["rows_back"] @ torch.cat(filtered, 1).flatten(2)
        y = y.unflatten(1, (2, height)).unflatten(3, (frequencies, channels)).transpose(1, 2).flatten(2, 3)
        return matrices["columns_back"] @ y


class PointwiseFeedForward(nn.Module):
    """What a `FeedForward` with a depthwise convolution computes, (B, H, W, C) to (B, H, W, C), by convolutions alone.

    So a runtime that lays out images (B, C, H, W) transposes the grid before and after, not the wider hidden one.
    """

    def __init__(self, plain: FeedForward):
        super().__init__()
        self.layers = nn.Sequential(_pointwise(plain.fc1), plain.dwconv, plain.act, _pointwise(plain.fc2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _pointwise(linear: nn.Linear) -> nn.Conv2d:
    layer = nn.Conv2d(linear.in_features, linear.out_features, 1)
    layer.weight, layer.bias = nn.Parameter(linear.weight[..., None, None]), linear.bias
    return layer


def portable(model: nn.Module, dynamic: bool) -> nn.Module:
    """A copy of the model with these layers in the place of its own; its logits differ by rounding alone."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SpectralGate):
            model.set_submodule(name, FourierProducts(module, dynamic))
        elif isinstance(module, FeedForward) and module.dwconv is not None:
            model.set_submodule(name, PointwiseFeedForward(module))
    return model
