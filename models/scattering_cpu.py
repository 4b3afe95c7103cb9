"""The scattering mixer with channel blending in slices of a few images; see `slicing`.

All steps share buffers that stay in cache, and the backward pass computes what it needs anew from the mixer's
input. Both passes are made of the same two steps, `_Transform.split` and `_Transform.join`: filtering with
symmetric taps under symmetric extension is its own transpose, so each is the transpose of the other.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .layers import Grid
from .slicing import images_a_slice
from .wavelet import ANALYSIS, LOW_PHASES, PHASES_OF_PLANES, PLANES_OF_PHASES, SYNTHESIS, phases_of_image

# Entries of the transform, 4HWC an image, computed together: 8 MiB in float32, good on idle and busy machines.
SLICE_ELEMENTS = 2**21

# Samples that symmetric extension adds at each end of a column, for the longest filter.
_MARGIN = max(len(taps) // 2 for taps in (*ANALYSIS, *SYNTHESIS))


def fits(grid: Grid) -> bool:
    """Whether the columns of a grid are even in length and long enough to be extended at both ends."""
    return grid[0] % 2 == 0 and grid[0] > _MARGIN


class _Transform:
    """Splitting (n, H, W, C) into low-pass image and bands and joining them, in memory used again and again.

    Rows are filtered with a matrix, of which `wavelet` has two; columns, once extended, by convolutions.
    """

    def __init__(self, like: Tensor, columns: int):
        self.shape = images, height, _, channels = like.shape
        low, high = (like.new_empty(images, height + 2 * _MARGIN, columns, channels) for _ in range(2))
        self.extended = low, high
        self.middles = low[:, _MARGIN:-_MARGIN], high[:, _MARGIN:-_MARGIN]

    def split(self, x: Tensor, filters: tuple, matrix: Tensor, low: Tensor, bands: Tensor) -> None:
        """Filter x (n, H, W, C) into `low` and `bands`, its rows with the (2W', W) matrix."""
        for image, target in zip(x, self.middles[0], strict=True):
            torch.bmm(matrix.expand(len(image), -1, -1), image, out=target)
        _extend(self.extended[0])
        phases = _phases([_filter(self.extended[0], taps) for taps in filters])
        for target, i in zip(phases_of_image(low), LOW_PHASES, strict=True):
            torch.mul(phases[i], math.sqrt(2), out=target)
        for target, (operation, i, j) in zip(bands.flatten(0, 1), PLANES_OF_PHASES.values(), strict=True):
            operation(phases[i], phases[j], out=target)

    def join(self, low: Tensor, bands: Tensor, filters: tuple, matrix: Tensor, y: Tensor) -> None:
        """The transpose of `split` with the transposed matrix, into y."""
        phases = _phases(self.middles)
        for part, i in zip(phases_of_image(low), LOW_PHASES, strict=True):
            torch.mul(part, math.sqrt(2), out=phases[i])
        planes = bands.flatten(0, 1)
        for k, (operation, i, j) in PHASES_OF_PLANES.items():
            operation(planes[i], planes[j], out=phases[k])
        rows = []
        for extended, taps in zip(self.extended, filters, strict=True):
            _extend(extended)
            rows.append(_filter(extended, taps))
        rows = rows[0].add_(rows[1]).flatten(0, 1)
        torch.bmm(matrix.expand(len(rows), -1, -1), rows, out=y.flatten(0, 1))


def _extend(x: Tensor) -> None:
    """Half-sample symmetric extension of the columns of (n, H + 2 * _MARGIN, W, C), of which the middle is set."""
    x[:, :_MARGIN] = x[:, _MARGIN : 2 * _MARGIN].flip(1)
    x[:, -_MARGIN:] = x[:, -2 * _MARGIN : -_MARGIN].flip(1)


def _filter(extended: Tensor, taps: tuple[float, ...]) -> Tensor:
    """Columns of (n, H + 2 * _MARGIN, W, C) filtered: (n, H, W, C)."""
    spare, channels = _MARGIN - len(taps) // 2, extended.shape[3]
    kernel = extended.new_tensor(taps).view(1, 1, -1, 1).expand(channels, -1, -1, -1)
    x = extended[:, spare : extended.shape[1] - spare].permute(0, 3, 1, 2)
    return F.conv2d(x, kernel, groups=channels).permute(0, 2, 3, 1)


def _phases(halves: list[Tensor] | tuple[Tensor, Tensor]) -> list[Tensor]:
    """The 16 phases of (low-pass, high-pass) columns (n, H, 2W', C), whose rows are in order of phase; views."""
    rows = [half[:, parity::2] for half in halves for parity in (0, 1)]
    return [phase for row in rows for phase in row.unflatten(2, (4, -1)).unbind(2)]


class _Results:
    """Memory for the low-pass image, the bands and the hidden layer of the images `like`."""

    def __init__(self, like: Tensor, columns: int, layer1: Tensor):
        images, height, _, channels = like.shape
        blocks, _, width = layer1.shape[1:]
        self.low = like.new_empty(images, height, columns // 2, channels)
        self.bands = like.new_empty(2, 6, images, height // 2, columns // 4, channels)
        self.hidden = like.new_empty(blocks, images * 6 * (height // 2) * (columns // 4), width)
        # Real and imaginary part of the bands as (blocks, positions, size), views.
        self.parts = self.bands.flatten(1, -2).unflatten(2, (blocks, -1)).transpose(1, 2)

    def compute_hidden(self, layer1: Tensor, bias1: Tensor) -> None:
        torch.baddbmm(bias1[:, None], self.parts[0], layer1[0], out=self.hidden)
        self.hidden.baddbmm_(self.parts[1], layer1[1]).relu_()


class ScatterInSlices(torch.autograd.Function):
    """x (B, H, W, C), matrices for its rows, low-pass weight, and two layers as real matrices to y.

    The layers: from real and from imaginary part to hidden, (2, blocks, size, 2 * size), with bias
    (blocks, 2 * size); from hidden to real and to imaginary part, (2, blocks, 2 * size, size), with bias
    (2, blocks, size).
    """

    @staticmethod
    def forward(ctx, x, analysis, synthesis, low_pass, layer1, bias1, layer2, bias2):
        x = x.contiguous()
        ctx.save_for_backward(x, analysis, synthesis, low_pass, layer1, bias1, layer2, bias2)
        y = torch.empty_like(x)
        size = 0
        for part, out in _slices(x, y):
            if len(part) != size:
                size = len(part)
                transform = _Transform(part, len(analysis))
                results = _Results(part, len(analysis), layer1)
            transform.split(part, ANALYSIS, analysis, results.low, results.bands)
            results.low.mul_(low_pass)
            results.compute_hidden(layer1, bias1)
            for target, weight, bias in zip(results.parts, layer2, bias2, strict=True):
                torch.baddbmm(bias[:, None], results.hidden, weight, out=target)
            transform.join(results.low, results.bands, SYNTHESIS, synthesis, out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, analysis, synthesis, low_pass, layer1, bias1, layer2, bias2 = ctx.saved_tensors
        x_gradient = torch.empty_like(x)
        sums = [torch.zeros_like(weight) for weight in (low_pass, layer1, bias1, layer2, bias2)]
        of_low_pass, of_layer1, of_bias1, of_layer2, of_bias2 = sums
        size = 0
        for part, of_out, out in _slices(x, gradient.contiguous(), x_gradient):
            if len(part) != size:
                size = len(part)
                transform = _Transform(part, len(analysis))
                results, of = (_Results(part, len(analysis), layer1) for _ in range(2))
            transform.split(part, ANALYSIS, analysis, results.low, results.bands)
            transform.split(of_out, SYNTHESIS, synthesis.T, of.low, of.bands)
            of_low_pass += results.low.mul_(of.low).sum(0)
            of.low.mul_(low_pass)
            results.compute_hidden(layer1, bias1)
            torch.bmm(of.parts[0], layer2[0].mT, out=of.hidden).baddbmm_(of.parts[1], layer2[1].mT)
            torch.ops.aten.threshold_backward.grad_input(of.hidden, results.hidden, 0, grad_input=of.hidden)
            for i in range(2):
                of_layer2[i].baddbmm_(results.hidden.mT, of.parts[i])
                of_bias2[i] += of.parts[i].sum(1)
                of_layer1[i].baddbmm_(results.parts[i].mT, of.hidden)
                torch.bmm(of.hidden, layer1[i].mT, out=of.parts[i])
            of_bias1 += of.hidden.sum(1)
            transform.join(of.low, of.bands, ANALYSIS, analysis.T, out)
        return x_gradient, None, None, *sums


def _slices(*tensors: Tensor) -> zip:
    """The tensors (B, H, W, C) a few images at a time."""
    size = images_a_slice(4 * tensors[0][0].numel(), SLICE_ELEMENTS)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
