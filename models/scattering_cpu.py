"""The scattering mixer with channel blending in slices of a few images; see `slicing`.

All steps share buffers that stay in cache, and the backward pass computes what it needs anew from the mixer's
input. Both passes are made of the same two steps, `split` and `join`: one is the transpose of the other.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slicing import images_a_slice
from .wavelet import ANALYSIS, LOW_PHASES, PHASES_OF_PLANES, PLANES_OF_PHASES, SYNTHESIS, phases_of, phases_of_image

# Entries of the transform, 4HWC an image, computed together: 4 MiB in float32, measured best of 4 to 32.
SLICE_ELEMENTS = 2**20

# Length from which convolutions filter columns faster than a matrix does: measured between 28 and 56.
CONVOLUTION_LENGTH = 40

# Samples that symmetric extension adds at each end of a column, for the longest filter.
_MARGIN = max(len(taps) // 2 for taps in (*ANALYSIS, *SYNTHESIS))


class _Filters(NamedTuple):
    """Low- and high-pass taps, and the matrices that filter columns and rows with them."""

    taps: tuple[tuple[float, ...], tuple[float, ...]]
    columns: Tensor
    rows: Tensor

    @property
    def transposed(self) -> "_Filters":
        """Filtering with symmetric taps under symmetric extension is its own transpose."""
        return _Filters(self.taps, self.columns.T, self.rows.T)


class _Transform:
    """Splits images (n, H, W, C) into low-pass image and bands, and joins them, in memory used again and again.

    A subclass filters the columns: `_filter` gives the 16 phases of x filtered along both axes, and
    `_filter_back` takes what lies in `phases` to (n, H, 2W', C), whose rows remain.
    """

    phases: list[Tensor]

    def split(self, x: Tensor, filters: _Filters, low: Tensor, bands: Tensor) -> None:
        """Filter x into `low` and `bands`."""
        phases = self._filter(x, filters)
        for target, i in zip(phases_of_image(low), LOW_PHASES, strict=True):
            torch.mul(phases[i], math.sqrt(2), out=target)
        for target, (operation, i, j) in zip(bands.flatten(0, 1), PLANES_OF_PHASES.values(), strict=True):
            operation(phases[i], phases[j], out=target)

    def join(self, low: Tensor, bands: Tensor, filters: _Filters, y: Tensor) -> None:
        """The transpose of `split` with transposed filters, into y."""
        for part, i in zip(phases_of_image(low), LOW_PHASES, strict=True):
            torch.mul(part, math.sqrt(2), out=self.phases[i])
        planes = bands.flatten(0, 1)
        for k, (operation, i, j) in PHASES_OF_PLANES.items():
            operation(planes[i], planes[j], out=self.phases[k])
        half = self._filter_back(filters).flatten(0, 1)
        torch.bmm(_repeat(filters.rows, half), half, out=y.flatten(0, 1))


class _ByMatrices(_Transform):
    """Filters columns with a matrix."""

    def __init__(self, like: Tensor, rows: int, columns: int):
        images, height, _, channels = like.shape
        self.half = like.new_empty(images, height, columns, channels)  # filtered along its rows alone
        self.filtered = like.new_empty(images, rows, columns, channels)
        self.phases = phases_of(self.filtered)

    def _filter(self, x: Tensor, filters: _Filters) -> list[Tensor]:
        torch.bmm(_repeat(filters.rows, x.flatten(0, 1)), x.flatten(0, 1), out=self.half.flatten(0, 1))
        torch.bmm(_repeat(filters.columns, x), self.half.flatten(2), out=self.filtered.flatten(2))
        return self.phases

    def _filter_back(self, filters: _Filters) -> Tensor:
        filtered = self.filtered.flatten(2)
        torch.bmm(_repeat(filters.columns, filtered), filtered, out=self.half.flatten(2))
        return self.half


class _ByConvolutions(_Transform):
    """Filters columns, of even length and extended at both ends, by depthwise convolutions."""

    def __init__(self, like: Tensor, rows: int, columns: int):
        images, height, _, channels = like.shape
        shape = (images, height + 2 * _MARGIN, columns, channels)
        self.low, self.high = like.new_empty(shape), like.new_empty(shape)
        self.phases = _phases_of_columns(self.low[:, _MARGIN:-_MARGIN], self.high[:, _MARGIN:-_MARGIN])

    def _filter(self, x: Tensor, filters: _Filters) -> list[Tensor]:
        for image, target in zip(x, self.low[:, _MARGIN:-_MARGIN], strict=True):
            torch.bmm(_repeat(filters.rows, image), image, out=target)
        _extend(self.low)
        return _phases_of_columns(*(_convolve(self.low, taps) for taps in filters.taps))

    def _filter_back(self, filters: _Filters) -> Tensor:
        low, high = filters.taps
        _extend(self.low)
        _extend(self.high)
        return _convolve(self.low, low).add_(_convolve(self.high, high))


def _repeat(matrix: Tensor, batch: Tensor) -> Tensor:
    return matrix.expand(len(batch), -1, -1)


def _extend(x: Tensor) -> None:
    """Half-sample symmetric extension of the columns of (n, H + 2 * _MARGIN, W, C), of which the middle is set."""
    x[:, :_MARGIN] = x[:, _MARGIN : 2 * _MARGIN].flip(1)
    x[:, -_MARGIN:] = x[:, -2 * _MARGIN : -_MARGIN].flip(1)


def _convolve(extended: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Columns of (n, H + 2 * _MARGIN, W, C) filtered: (n, H, W, C)."""
    spare, channels = _MARGIN - len(taps) // 2, extended.shape[3]
    kernel = extended.new_tensor(taps).view(1, 1, -1, 1).expand(channels, -1, -1, -1)
    x = extended[:, spare : extended.shape[1] - spare].permute(0, 3, 1, 2)
    return F.conv2d(x, kernel, groups=channels).permute(0, 2, 3, 1)


def _phases_of_columns(low: Tensor, high: Tensor) -> list[Tensor]:
    """The 16 phases of filtered columns (n, H, 2W', C), whose rows are in order of phase; views."""
    rows = [half[:, parity::2] for half in (low, high) for parity in (0, 1)]
    return [phase for row in rows for phase in row.unflatten(2, (4, -1)).unbind(2)]


class _Memory:
    """What is computed for the images `like`: low-pass image, bands, hidden layer."""

    def __init__(self, like: Tensor, rows: int, columns: int, layer1: Tensor):
        images, channels = len(like), like.shape[3]
        blocks, _, width = layer1.shape[1:]
        self.low = like.new_empty(images, rows // 2, columns // 2, channels)
        self.bands = like.new_empty(2, 6, images, rows // 4, columns // 4, channels)
        self.hidden = like.new_empty(blocks, self.bands[0, ..., 0].numel(), width)
        # Real and imaginary part of the bands as (blocks, positions, size), views.
        self.parts = self.bands.flatten(1, -2).unflatten(2, (blocks, -1)).transpose(1, 2)

    def compute_hidden(self, layer1: Tensor, bias1: Tensor) -> None:
        torch.baddbmm(bias1[:, None], self.parts[0], layer1[0], out=self.hidden)
        self.hidden.baddbmm_(self.parts[1], layer1[1]).relu_()


class ScatterInSlices(torch.autograd.Function):
    """x (B, H, W, C), the transform's matrices, low-pass weight, and two layers as real matrices to y.

    The layers: from real and from imaginary part to hidden, (2, blocks, size, 2 * size), with bias
    (blocks, 2 * size); from hidden to real and to imaginary part, (2, blocks, 2 * size, size), with bias
    (2, blocks, size).
    """

    @staticmethod
    def forward(ctx, x, analysis0, analysis1, synthesis0, synthesis1, low_pass, layer1, bias1, layer2, bias2):
        x = x.contiguous()
        ctx.save_for_backward(
            x, analysis0, analysis1, synthesis0, synthesis1, low_pass, layer1, bias1, layer2, bias2
        )
        analysis = _Filters(ANALYSIS, analysis0, analysis1)
        synthesis = _Filters(SYNTHESIS, synthesis0, synthesis1)
        y = torch.empty_like(x)
        size = 0
        for part, out in _slices(x, y):
            if len(part) != size:
                size = len(part)
                transform, memory = _allocate(part, analysis, layer1)
            transform.split(part, analysis, memory.low, memory.bands)
            memory.low.mul_(low_pass)
            memory.compute_hidden(layer1, bias1)
            for target, weight, bias in zip(memory.parts, layer2, bias2, strict=True):
                torch.baddbmm(bias[:, None], memory.hidden, weight, out=target)
            transform.join(memory.low, memory.bands, synthesis, out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, analysis0, analysis1, synthesis0, synthesis1, *weights = ctx.saved_tensors
        analysis = _Filters(ANALYSIS, analysis0, analysis1)
        synthesis = _Filters(SYNTHESIS, synthesis0, synthesis1)
        low_pass, layer1, bias1, layer2, _ = weights
        x_gradient = torch.empty_like(x)
        sums = [torch.zeros_like(weight) for weight in weights]
        of_low_pass, of_layer1, of_bias1, of_layer2, of_bias2 = sums
        size = 0
        for part, of_out, out in _slices(x, gradient.contiguous(), x_gradient):
            if len(part) != size:
                size = len(part)
                transform, memory = _allocate(part, analysis, layer1)
                _, of = _allocate(part, analysis, layer1)  # the gradients of what `memory` holds
            transform.split(part, analysis, memory.low, memory.bands)
            transform.split(of_out, synthesis.transposed, of.low, of.bands)
            of_low_pass += memory.low.mul_(of.low).sum(0)
            of.low.mul_(low_pass)
            memory.compute_hidden(layer1, bias1)
            torch.bmm(of.parts[0], layer2[0].mT, out=of.hidden).baddbmm_(of.parts[1], layer2[1].mT)
            torch.ops.aten.threshold_backward.grad_input(of.hidden, memory.hidden, 0, grad_input=of.hidden)
            for i in range(2):
                of_layer2[i].baddbmm_(memory.hidden.mT, of.parts[i])
                of_bias2[i] += of.parts[i].sum(1)
                of_layer1[i].baddbmm_(memory.parts[i].mT, of.hidden)
                torch.bmm(of.hidden, layer1[i].mT, out=of.parts[i])
            of_bias1 += of.hidden.sum(1)
            transform.join(of.low, of.bands, analysis.transposed, out)
        return x_gradient, None, None, None, None, *sums


def _slices(*tensors: Tensor) -> zip:
    """The tensors (B, H, W, C) a few images at a time."""
    size = images_a_slice(len(tensors[0]), 4 * tensors[0][0].numel(), SLICE_ELEMENTS)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _allocate(x: Tensor, analysis: _Filters, layer1: Tensor) -> tuple[_Transform, _Memory]:
    """Memory to transform and blend the images x in."""
    size = len(analysis.columns), len(analysis.rows)
    by_convolutions = x.shape[1] >= CONVOLUTION_LENGTH and x.shape[1] % 2 == 0
    transform = _ByConvolutions if by_convolutions else _ByMatrices
    return transform(x, *size), _Memory(x, *size, layer1)
