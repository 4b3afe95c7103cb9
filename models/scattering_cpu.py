"""The scattering mixer with channel blending in slices of a few images; see `slicing`.

All steps share buffers that stay in cache, and the backward pass computes what it needs anew from the mixer's
input. Both passes are made of the same steps: the transpose of filtering and splitting into bands is joining the
bands and filtering.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slicing import images_a_slice
from .wavelet import LOW_PHASES, PHASES_OF_PLANES, PLANES_OF_PHASES, phases_of, phases_of_image

# Entries of the transform, 4HWC an image, computed together: 16 MiB in float32, measured best of 2 to 32.
SLICE_ELEMENTS = 2**22


class _Buffers:
    """Memory for the transform of a few images and its filtering."""

    def __init__(self, like: Tensor, rows: int, columns: int):
        images, height, _, channels = like.shape
        self.half = like.new_empty(images, height, columns, channels)  # filtered along its rows alone
        self.filtered = like.new_empty(images, rows, columns, channels)
        self.phases = phases_of(self.filtered)

    def decompose(self, x: Tensor, rows: Tensor, columns: Tensor, low: Tensor, bands: Tensor) -> None:
        """Filter x with one matrix along its columns, one along its rows, into low-pass image and bands."""
        torch.bmm(_repeat(columns, x.flatten(0, 1)), x.flatten(0, 1), out=self.half.flatten(0, 1))
        torch.bmm(_repeat(rows, x), self.half.flatten(2), out=self.filtered.flatten(2))
        for target, i in zip(phases_of_image(low), LOW_PHASES, strict=True):
            torch.mul(self.phases[i], math.sqrt(2), out=target)
        for target, (operation, i, j) in zip(bands.flatten(0, 1), PLANES_OF_PHASES.values(), strict=True):
            operation(self.phases[i], self.phases[j], out=target)

    def compose(self, low: Tensor, bands: Tensor, rows: Tensor, columns: Tensor, y: Tensor) -> None:
        """The transpose of `decompose` with transposed matrices, into y."""
        for part, i in zip(phases_of_image(low), LOW_PHASES, strict=True):
            torch.mul(part, math.sqrt(2), out=self.phases[i])
        planes = bands.flatten(0, 1)
        for k, (operation, i, j) in PHASES_OF_PLANES.items():
            operation(planes[i], planes[j], out=self.phases[k])
        torch.bmm(_repeat(rows, low), self.filtered.flatten(2), out=self.half.flatten(2))
        torch.bmm(_repeat(columns, y.flatten(0, 1)), self.half.flatten(0, 1), out=y.flatten(0, 1))


def _repeat(matrix: Tensor, batch: Tensor) -> Tensor:
    return matrix.expand(len(batch), -1, -1)


def _blocks(bands: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the bands as (blocks, positions, size), views."""
    real, imaginary = bands.flatten(1, -2).unflatten(2, (blocks, -1)).transpose(1, 2)
    return real, imaginary


class ScatterInSlices(torch.autograd.Function):
    """x (B, H, W, C), analysis and synthesis matrices, low-pass weight, and two layers as real matrices to y.

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
        y = torch.empty_like(x)
        size = images_a_slice(4 * x[0].numel(), SLICE_ELEMENTS)
        low, bands, hidden, buffers = _allocate(x[:size], analysis0, analysis1, layer1)
        for part, out in zip(x.split(size), y.split(size), strict=True):
            if len(part) < size:
                low, bands, hidden, buffers = _allocate(part, analysis0, analysis1, layer1)
                size = len(part)
            buffers.decompose(part, analysis0, analysis1, low, bands)
            low.mul_(low_pass)
            parts = _blocks(bands, len(bias1))
            _hidden(parts, layer1, bias1, hidden)
            for target, weight, bias in zip(parts, layer2, bias2, strict=True):
                torch.baddbmm(bias[:, None], hidden, weight, out=target)
            buffers.compose(low, bands, synthesis0, synthesis1, out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, analysis0, analysis1, synthesis0, synthesis1, low_pass, layer1, bias1, layer2, bias2 = ctx.saved_tensors
        gradient = gradient.contiguous()
        x_gradient = torch.empty_like(x)
        sums = [torch.zeros_like(weight) for weight in (low_pass, layer1, bias1, layer2, bias2)]
        of_low_pass, of_layer1, of_bias1, of_layer2, of_bias2 = sums
        size = 0
        whole = images_a_slice(4 * x[0].numel(), SLICE_ELEMENTS)
        for part, g, out in zip(*(tensor.split(whole) for tensor in (x, gradient, x_gradient)), strict=True):
            if len(part) != size:
                size = len(part)
                low, bands, hidden, buffers = _allocate(part, analysis0, analysis1, layer1)
                low_g, bands_g, hidden_g = (torch.empty_like(tensor) for tensor in (low, bands, hidden))
            buffers.decompose(part, analysis0, analysis1, low, bands)
            buffers.decompose(g, synthesis0.T, synthesis1.T, low_g, bands_g)
            of_low_pass += low.mul_(low_g).sum(0)
            low_g.mul_(low_pass)
            parts, parts_g = _blocks(bands, len(bias1)), _blocks(bands_g, len(bias1))
            _hidden(parts, layer1, bias1, hidden)
            torch.bmm(parts_g[0], layer2[0].mT, out=hidden_g).baddbmm_(parts_g[1], layer2[1].mT)
            torch.ops.aten.threshold_backward.grad_input(hidden_g, hidden, 0, grad_input=hidden_g)
            for i in range(2):
                of_layer2[i].baddbmm_(hidden.mT, parts_g[i])
                of_bias2[i] += parts_g[i].sum(1)
                of_layer1[i].baddbmm_(parts[i].mT, hidden_g)
                torch.bmm(hidden_g, layer1[i].mT, out=parts_g[i])
            of_bias1 += hidden_g.sum(1)
            buffers.compose(low_g, bands_g, analysis0.T, analysis1.T, out)
        return x_gradient, None, None, None, None, *sums


def _allocate(x: Tensor, analysis0: Tensor, analysis1: Tensor, layer1: Tensor):
    """Memory for the images x: low-pass image, bands, hidden layer, and that of the transform."""
    rows, columns = len(analysis0) // 2, len(analysis1) // 2
    low = x.new_empty(len(x), rows, columns, x.shape[3])
    bands = x.new_empty(2, 6, len(x), rows // 2, columns // 2, x.shape[3])
    blocks, _, width = layer1.shape[1:]
    hidden = x.new_empty(blocks, bands[0, ..., 0].numel(), width)
    return low, bands, hidden, _Buffers(x, 2 * rows, 2 * columns)


def _hidden(parts: tuple[Tensor, Tensor], layer1: Tensor, bias1: Tensor, hidden: Tensor) -> None:
    torch.baddbmm(bias1[:, None], parts[0], layer1[0], out=hidden).baddbmm_(parts[1], layer1[1]).relu_()
