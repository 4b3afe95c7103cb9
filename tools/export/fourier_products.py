"""The spectral gate as products with real matrices, for runtimes whose Fourier transform is slow or missing."""

import copy

import torch
from torch import Tensor, nn

from models.fourier_matrices import fourier_matrices
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


def with_fourier_products(model: nn.Module, dynamic: bool) -> nn.Module:
    """A copy of the model whose spectral gates are `FourierProducts`; its logits differ by rounding alone."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, SpectralGate):
            model.set_submodule(name, FourierProducts(module, dynamic))
    return model
