"""The scattering mixer with channel blending in slices of a few images; see `slicing`.

All steps share buffers that stay in cache. Both passes are made of the same two steps, `split` and `join`: one
is the transpose of the other. In every buffer the images come first, so that each core keeps to images of its
own: where two do not share a cache, fetching each other's results takes longer than the arithmetic.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .slicing import images_a_slice
from .wavelet import PHASES_OF_PLANES, PLANES_OF_PHASES, phases_of

# Entries of the transform, 4HWC an image, computed together: 4 MiB in float32, measured best of 2 to 16.
SLICE_ELEMENTS = 2**20

Filters = tuple[Tensor, Tensor]  # the matrices that filter columns and rows


def _multiply(matrix: Tensor, batch: Tensor, out: Tensor) -> Tensor:
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch, out=out)


class _Transform:
    """Splits images (n, H, W, C) into low-pass image and bands, and joins them, in memory used again and again.

    `low` is the low-pass image divided by sqrt(2), its rows and columns in order of phase. It stays where the
    filters leave it; the bands, by block of channels, are put in order for the matrix products.
    """

    def __init__(self, like: Tensor, filters: Filters, blocks: int):
        (columns, _), (rows, width) = (matrix.shape for matrix in filters)
        images, channels = len(like), like.shape[3]
        self.half = like.new_empty(images, columns, width, channels)  # filtered along its columns alone
        self.filtered = like.new_empty(images, columns, rows, channels)
        self.low = self.filtered[:, : columns // 2, : rows // 2]
        self.phases = [phase.unflatten(3, (blocks, -1)) for phase in phases_of(self.filtered)]
        self.bands_shape = (images, blocks, 6, columns // 4, rows // 4, 2, channels // blocks)

    def split(self, x: Tensor, filters: Filters, bands: Tensor) -> None:
        """Filter x into `low` and the bands."""
        columns, rows = filters
        _multiply(columns, x.flatten(2), out=self.half.flatten(2))
        _multiply(rows, self.half.flatten(0, 1), out=self.filtered.flatten(0, 1))
        for target, (operation, i, j) in zip(self._planes(bands), PLANES_OF_PHASES.values(), strict=True):
            operation(self.phases[i], self.phases[j], out=target)

    def join(self, bands: Tensor, filters: Filters, y: Tensor) -> None:
        """The transpose of `split` with transposed filters, of `low` and the bands, into y."""
        columns, rows = filters
        planes = self._planes(bands)
        for k, (operation, i, j) in PHASES_OF_PLANES.items():
            operation(planes[i], planes[j], out=self.phases[k])
        _multiply(rows, self.filtered.flatten(0, 1), out=self.half.flatten(0, 1))
        _multiply(columns, self.half.flatten(2), out=y.flatten(2))

    def empty_bands(self) -> Tensor:
        """Memory for bands: (images * blocks, positions, size of a block's real and imaginary part)."""
        images, blocks, *_, size = self.bands_shape
        return self.filtered.new_empty(self.bands_shape).view(images * blocks, -1, 2 * size)

    def _planes(self, bands: Tensor) -> list[Tensor]:
        """Six real, six imaginary: (images, rows, columns, blocks, size), views."""
        parts = bands.view(self.bands_shape).permute(5, 2, 0, 3, 4, 1, 6)
        return [plane for part in parts for plane in part]


class ScatterInSlices(torch.autograd.Function):
    """x (B, H, W, C), the transform's matrices, the weight of `_Transform.low`, two real layers, to y.

    The layers' matrices are (blocks, 2 * size, 2 * size), their biases (blocks, 2 * size). For the backward
    pass, where `keep` says that there is one, it keeps the coefficients of x.
    """

    @staticmethod
    def forward(ctx, x, keep, analysis0, analysis1, synthesis0, synthesis1, low_weight, layer1, bias1, layer2, bias2):
        x = x.contiguous()
        analysis, synthesis = (analysis0, analysis1), (synthesis0, synthesis1)
        blocks, y, size, kept = len(layer1), torch.empty_like(x), 0, []
        for part, out in zip(*_in_slices(x, y), strict=True):
            if len(part) != size:
                size = len(part)
                transform = _Transform(part, analysis, blocks)
                hidden, blended = transform.empty_bands(), transform.empty_bands()
                matrix1, add1 = layer1.repeat(size, 1, 1), bias1.repeat(size, 1)[:, None]
                matrix2, add2 = layer2.repeat(size, 1, 1), bias2.repeat(size, 1)[:, None]
            bands = transform.empty_bands() if keep else blended
            transform.split(part, analysis, bands)
            if keep:
                kept += [transform.low.clone(), bands]
            transform.low.mul_(low_weight)
            torch.baddbmm(add1, bands, matrix1, out=hidden).relu_()
            torch.baddbmm(add2, hidden, matrix2, out=blended)
            transform.join(blended, synthesis, out)
        ctx.save_for_backward(*analysis, *synthesis, low_weight, layer1, bias1, layer2, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        saved = ctx.saved_tensors  # read once: gradient checkpointing allows no second time
        *matrices, low_weight, layer1, bias1, layer2 = saved[:8]
        of_split, of_join = ([matrix.mT for matrix in filters] for filters in (matrices[:2], matrices[2:]))
        kept = iter(saved[8:])
        gradient = gradient.contiguous()
        blocks, x_gradient, size = len(layer1), torch.empty_like(gradient), 0
        of_low_weight, of_layer1, of_layer2 = map(torch.zeros_like, (low_weight, layer1, layer2))
        of_bias1, of_bias2 = torch.zeros_like(bias1), torch.zeros_like(bias1)
        for of_y, of_x in zip(*_in_slices(gradient, x_gradient), strict=True):
            if len(of_y) != size:
                size = len(of_y)
                transform = _Transform(of_y, of_join, blocks)
                hidden, of_hidden, of_bands = (transform.empty_bands() for _ in range(3))
                matrix1, add1 = layer1.repeat(size, 1, 1), bias1.repeat(size, 1)[:, None]
                matrix2 = layer2.repeat(size, 1, 1)
            low, bands = next(kept), next(kept)
            transform.split(of_y, of_join, of_bands)
            of_low_weight += (low * transform.low).sum(0)
            transform.low.mul_(low_weight)
            torch.baddbmm(add1, bands, matrix1, out=hidden).relu_()
            torch.bmm(of_bands, matrix2.mT, out=of_hidden)
            torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
            of_layer2 += _by_block(torch.bmm(hidden.mT, of_bands), blocks)
            of_bias2 += _by_block(of_bands.sum(1), blocks)
            of_layer1 += _by_block(torch.bmm(bands.mT, of_hidden), blocks)
            of_bias1 += _by_block(of_hidden.sum(1), blocks)
            torch.bmm(of_hidden, matrix1.mT, out=of_bands)
            transform.join(of_bands, of_split, of_x)
        return x_gradient, *[None] * 5, of_low_weight, of_layer1, of_bias1, of_layer2, of_bias2


def _by_block(x: Tensor, blocks: int) -> Tensor:
    """(images * blocks, ...) summed over the images."""
    return x.unflatten(0, (-1, blocks)).sum(0)


def _in_slices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each (B, H, W, C) a few images at a time, at least one for each processor."""
    elements = 4 * tensors[0][0].numel()
    most = max(SLICE_ELEMENTS, torch.get_num_threads() * elements)
    size = images_a_slice(len(tensors[0]), elements, most)
    return [tensor.split(size) for tensor in tensors]
