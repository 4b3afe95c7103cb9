"""The spectral gate as products with small Fourier matrices, a few images at a time.

There is no FFT in half precision on a CPU, and in full precision one of a small grid takes as long as the products, its
gradient longer, and leaves its result channel by channel, where the next layer reads it slowly. Both passes are made of
the same two steps, `to_frequencies` and `to_tokens`: with the matrices transposed each is the other's transpose.
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from timm.models import register_notrace_module
from torch import Tensor

from .. import spectral_gate
from ..fourier_matrices import fourier_matrices
from ..layers import Grid
from ..spectral_gate import resize_filter
from .operations import of_first_result, operation, save_for_backward
from .slicing import images_per_slice, may_slice

# Entries of the spectrum, about HWC an image, computed together: 2 MiB in half precision.
SLICE_ELEMENTS = 2**20
# Rows and columns of the largest grids on which products are the faster way.
LARGEST_GRID = {torch.bfloat16: 200, torch.float32: 56, torch.float64: 56}

# (2F, W): a row of the grid to its F frequencies, and (2H, 2H): all columns of these to theirs.
Matrices = tuple[Tensor, Tensor]


@register_notrace_module  # by timm's tracer, so that it stays as fast in a graph
class SpectralGate(spectral_gate.SpectralGate):
    """`spectral_gate.SpectralGate`, by products of matrices where it may be sliced and the grid is small."""

    def forward(self, x: Tensor) -> Tensor:
        half = self.spectral_precision == "half"
        if may_slice(x, (self.complex_weight,), half=half):
            signal = self.spectral_input(x)
            if max(x.shape[1:3]) <= LARGEST_GRID[signal.dtype]:
                y = gate(signal, torch.is_grad_enabled(), resize_filter(self.complex_weight, x.shape[1:3]))[0]
                return y if half else y.to(x.dtype)
        return super().forward(x)


@lru_cache(maxsize=64)
def _matrices(grid: Grid, dtype: torch.dtype) -> tuple[Matrices, Matrices]:
    """Those of the transform, and those of its inverse transposed.

    Between the two products lie (H, 2, F) numbers: row, real or imaginary part, frequency; after them (2, H, F).
    """
    matrices = {name: matrix.to(dtype) for name, matrix in fourier_matrices(grid, torch.float64).items()}
    height = grid[0]
    by_row = [part * height + row for row in range(height) for part in range(2)]
    return (
        (matrices["columns"], matrices["rows"][:, by_row].contiguous()),
        (matrices["columns_back"].T.contiguous(), matrices["rows_back"].T[:, by_row].contiguous()),
    )


def _to_frequencies(x: Tensor, matrices: Matrices, between: Tensor, spectrum: Tensor) -> None:
    """(n, H, W, C) into the spectrum (n, 2, H, F, C); `between` is memory for as much."""
    columns, rows = matrices
    _multiply(columns, x.flatten(0, 1), out=between.view(-1, len(columns), x.shape[3]))
    _multiply(rows, between.view(len(x), len(rows), -1), out=spectrum.view(len(x), len(rows), -1))


def _to_tokens(spectrum: Tensor, matrices: Matrices, between: Tensor, y: Tensor) -> None:
    """The transpose of `_to_frequencies`: the spectrum into (n, H, W, C)."""
    columns, rows = matrices
    _multiply(rows.mT, spectrum.view(len(y), len(rows), -1), out=between.view(len(y), len(rows), -1))
    _multiply(columns.mT, between.view(-1, len(columns), y.shape[3]), out=y.flatten(0, 1))


def _multiply(matrix: Tensor, batch: Tensor, out: Tensor) -> Tensor:
    # Not torch.bmm, which ptflops would count: a gate's multiply-adds are those of its FFT, see models/flops.py.
    return torch.ops.aten.bmm.out(matrix.expand(len(batch), -1, -1), batch, out=out)


def _filter(spectrum: Tensor, weight: Tensor, out: Tensor) -> None:
    """Complex product of (n, 2, H, F, C) and as much, or (1, 2, H, F, C)."""
    (real, imaginary), (weight_real, weight_imaginary) = spectrum.unbind(1), weight.unbind(1)
    out_real, out_imaginary = out.unbind(1)
    torch.mul(real, weight_real, out=out_real).addcmul_(imaginary, weight_imaginary, value=-1)
    torch.mul(real, weight_imaginary, out=out_imaginary).addcmul_(imaginary, weight_real)


@operation("gate")
def gate(x: Tensor, keep: bool, complex_weight: Tensor) -> tuple[Tensor, Tensor]:
    """`spectral_gate.gate` in the dtype of x, and where there may be a backward pass (`keep`) the spectrum of x.

    The spectrum is (B, 2, H, W // 2 + 1, C), real parts first; else it is empty.
    """
    y, spectrum = _empty_results(x, keep, complex_weight)
    there, back = _matrices(tuple(x.shape[1:3]), x.dtype)
    weight = torch.stack(complex_weight.to(x.dtype).unbind(-1))[None]
    images = 0
    for part, out, kept in _in_slices(x.contiguous(), y, spectrum):
        if len(part) != images:
            images = len(part)
            between, filtered = (part.new_empty(images, *weight.shape[1:]) for _ in range(2))
        split = kept if keep else torch.empty_like(filtered)
        _to_frequencies(part, there, between, split)
        _filter(split, weight, out=filtered)
        _to_tokens(filtered, back, between, out)
    return y, spectrum


@gate.register_fake
def _empty_results(x, keep, complex_weight):
    """Room for what `gate` gives."""
    spectrum = (x.shape[0], 2, *complex_weight.shape[:3]) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(spectrum)


@operation("gate_backward")
def gate_backward(grad: Tensor, spectrum: Tensor, complex_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight; the latter adds up in its own precision."""
    grad_x, grad_weight = _empty_gradients(grad, spectrum, complex_weight)
    there, back = _matrices(tuple(grad.shape[1:3]), grad.dtype)
    real, imaginary = complex_weight.to(grad.dtype).unbind(-1)
    conjugate = torch.stack((real, -imaginary))[None]
    total = torch.zeros(conjugate.shape[1:], dtype=grad_weight.dtype)
    images = 0
    for part, out, kept in _in_slices(grad.contiguous(), grad_x, spectrum):
        if len(part) != images:
            images = len(part)
            between, split, filtered = (part.new_empty(images, *total.shape) for _ in range(3))
        _to_frequencies(part, back, between, split)
        real, imaginary = kept.unbind(1)
        _filter(split, torch.stack((real, -imaginary), 1), out=filtered)  # times the conjugate
        total += filtered.sum(0, dtype=total.dtype)
        _filter(split, conjugate, out=filtered)
        _to_tokens(filtered, there, between, out)
    return grad_x, grad_weight.copy_(total.movedim(0, -1))


@gate_backward.register_fake
def _empty_gradients(grad, _spectrum, complex_weight):
    """Room for what `gate_backward` gives."""
    return grad.new_empty(grad.shape), complex_weight.new_empty(complex_weight.shape)


def _keep(ctx, inputs, output):
    save_for_backward(ctx, output[1:], inputs[2])


@of_first_result
def _gradients(ctx, grad):
    grad_x, grad_weight = gate_backward(grad, *ctx.saved_tensors)
    return grad_x, None, grad_weight


gate.register_autograd(_gradients, setup_context=_keep)


def _in_slices(x: Tensor, y: Tensor, spectrum: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Grids and spectra of a few images at a time; an empty one stays as it is."""
    size = images_per_slice(len(x), x[0].numel(), SLICE_ELEMENTS)
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        yield x[part], y[part], spectrum[part] if spectrum.numel() else spectrum
