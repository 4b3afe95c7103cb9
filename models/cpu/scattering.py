"""The scattering mixer with channel blending in slices of a few images.

All steps share buffers that stay in cache. Both passes are made of the same two steps, `split` and `join`: one
is the transpose of the other. In every buffer the images come first, so that each core keeps to images of its
own: where two do not share a cache, fetching each other's results takes longer than the arithmetic.
"""

from collections.abc import Iterator

import torch
from timm.models import register_notrace_module
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import scattering
from ..layers import autocast_off
from ..scattering import EinsteinBlending, real_bias, real_matrix
from ..wavelet import DTCWT, analysis_matrix, fitting, images_of, synthesis_matrix
from .slicing import images_per_slice, may_slice, run

# Entries of the transform, 4HWC an image, computed together: 4 MiB in float32, measured best of 2 to 16.
SLICE_ELEMENTS = 2**20

Filters = tuple[Tensor, Tensor]  # the matrices that filter the height and the width


@register_notrace_module  # by timm's tracer, so that it stays as fast in a graph
class ScatteringMixer(scattering.ScatteringMixer):
    """`scattering.ScatteringMixer`, in slices for channel blending on the grid of construction, where that may be."""

    def scatter(self, x: Tensor) -> Tensor:
        """Transform, blending, inverse transform."""
        if not self._slices(x):
            return super().scatter(x)
        wavelet, blend, (height, width) = self.wavelet, self.channel_blend, self.grid_size
        filters = (
            fitting(wavelet.analysis_height, analysis_matrix, height, x),
            fitting(wavelet.analysis_width, analysis_matrix, width, x),
            fitting(wavelet.synthesis_height, synthesis_matrix, height, x),
            fitting(wavelet.synthesis_width, synthesis_matrix, width, x),
        )
        with autocast_off(x):
            # The low-pass image is multiplied by sqrt(2) going in and coming out.
            low_weight = 2 * _even_then_odd(self.low_pass)
            layer1, layer2 = real_matrix(blend.weight1), real_matrix(blend.weight2)
            bias1, bias2 = real_bias(blend.bias1), real_bias(blend.bias2)
            return run(ScatterInSlices, x, *filters, low_weight, layer1, bias1, layer2, bias2)

    def _slices(self, x: Tensor) -> bool:
        """Whether that may be, and nobody put another layer in the place of one."""
        return (
            self.mixing == "channel"
            and type(self.wavelet) is DTCWT
            and type(self.channel_blend) is EinsteinBlending
            and may_slice(x, (self.low_pass, *self.channel_blend.parameters()), (self.wavelet, self.channel_blend))
            and x.shape[1:3] == self.grid_size
        )


def _even_then_odd(image: Tensor) -> Tensor:
    """(H, W, C) with its even rows before its odd ones, and its even columns before its odd ones."""
    return image.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(1, 0, 3, 2, 4).reshape(image.shape)


def _multiply(matrix: Tensor, batch: Tensor, out: Tensor) -> Tensor:
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch, out=out)


class _Transform:
    """Splits images (n, H, W, C) into low-pass image and bands, and joins them, in memory used again and again.

    `low` is the low-pass image divided by sqrt(2), even rows and columns before odd ones. It stays where the
    filters leave it; the bands, by block of channels, are put in order for the matrix products.
    """

    def __init__(self, like: Tensor, filters: Filters, blocks: int):
        (height, _), (width, width_of_image) = (matrix.shape for matrix in filters)
        images, channels = len(like), like.shape[3]
        self.half = like.new_empty(images, height, width_of_image, channels)  # filtered along its height alone
        self.filtered = like.new_empty(images, height, width, channels)
        self.low = self.filtered[:, : height // 2, : width // 2]
        _, lh, hl, hh = images_of(self.filtered)
        self.high = [[pixels.unflatten(3, (blocks, -1)) for pixels in image] for image in (hl, hh, lh)]
        self.bands_shape = (images, blocks, 6, height // 4, width // 4, 2, channels // blocks)

    def split(self, x: Tensor, filters: Filters, bands: Tensor) -> None:
        """Filter x into `low` and the bands."""
        height, width = filters
        _multiply(height, x.flatten(2), out=self.half.flatten(2))
        _multiply(width, self.half.flatten(0, 1), out=self.filtered.flatten(0, 1))
        for (a, b, c, d), (real1, imaginary1), (real2, imaginary2) in self._high_pass(bands):
            torch.sub(a, d, out=real1)
            torch.add(b, c, out=imaginary1)
            torch.add(a, d, out=real2)
            torch.sub(b, c, out=imaginary2)

    def join(self, bands: Tensor, filters: Filters, y: Tensor) -> None:
        """The transpose of `split` with transposed filters, of `low` and the bands, into y."""
        height, width = filters
        for (a, b, c, d), (real1, imaginary1), (real2, imaginary2) in self._high_pass(bands):
            torch.add(real1, real2, out=a)
            torch.add(imaginary1, imaginary2, out=b)
            torch.sub(imaginary1, imaginary2, out=c)
            torch.sub(real2, real1, out=d)
        _multiply(width, self.filtered.flatten(0, 1), out=self.half.flatten(0, 1))
        _multiply(height, self.half.flatten(2), out=y.flatten(2))

    def empty_bands(self) -> Tensor:
        """Memory for bands: (images * blocks, positions, size of a block's real and imaginary part)."""
        images, blocks, *_, size = self.bands_shape
        return self.filtered.new_empty(self.bands_shape).view(images * blocks, -1, 2 * size)

    def _high_pass(self, bands: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor], list[Tensor]]]:
        """Each high-pass image's squares and its two bands, in views (images, rows, columns, blocks, size)."""
        parts = bands.view(self.bands_shape).permute(2, 5, 0, 3, 4, 1, 6)
        at15, at45, at75, at105, at135, at165 = (list(band) for band in parts)
        return zip(self.high, (at15, at45, at75), (at165, at135, at105), strict=True)


class ScatterInSlices(torch.autograd.Function):
    """x (B, H, W, C), the transform's matrices, the weight of `_Transform.low`, two real layers, to y.

    The layers' matrices are (blocks, 2 * size, 2 * size), their biases (blocks, 2 * size). With y come, where there
    may be a backward pass (`keep`), the coefficients of x, which it needs.
    """

    generate_vmap_rule = True  # torch.func wants one even where none of the tensors is transformed

    @staticmethod
    def forward(x, keep, analysis0, analysis1, synthesis0, synthesis1, low_weight, layer1, bias1, layer2, bias2):
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
        return y, *kept

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, *matrices, low_weight, layer1, bias1, layer2, _ = inputs
        _, *kept = output
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*matrices, low_weight, layer1, bias1, layer2, *kept)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 11
        saved = ctx.saved_tensors  # read once: gradient checkpointing allows no second time
        *matrices, low_weight, layer1, bias1, layer2 = saved[:8]
        kept = iter(saved[8:])
        of_split, of_join = ([matrix.mT for matrix in filters] for filters in (matrices[:2], matrices[2:]))
        grad = grad.contiguous()
        blocks, grad_x, size = len(layer1), torch.empty_like(grad), 0
        grad_low_weight, grad_layer1, grad_layer2 = map(torch.zeros_like, (low_weight, layer1, layer2))
        grad_bias1, grad_bias2 = torch.zeros_like(bias1), torch.zeros_like(bias1)
        for part, out in zip(*_in_slices(grad, grad_x), strict=True):
            if len(part) != size:
                size = len(part)
                transform = _Transform(part, of_join, blocks)
                hidden, grad_hidden, grad_bands = (transform.empty_bands() for _ in range(3))
                matrix1, add1 = layer1.repeat(size, 1, 1), bias1.repeat(size, 1)[:, None]
                matrix2 = layer2.repeat(size, 1, 1)
            low, bands = next(kept), next(kept)
            transform.split(part, of_join, grad_bands)
            grad_low_weight += (low * transform.low).sum(0)
            transform.low.mul_(low_weight)
            torch.baddbmm(add1, bands, matrix1, out=hidden).relu_()
            torch.bmm(grad_bands, matrix2.mT, out=grad_hidden)
            torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
            grad_layer2 += _by_block(torch.bmm(hidden.mT, grad_bands), blocks)
            grad_bias2 += _by_block(grad_bands.sum(1), blocks)
            grad_layer1 += _by_block(torch.bmm(bands.mT, grad_hidden), blocks)
            grad_bias1 += _by_block(grad_hidden.sum(1), blocks)
            torch.bmm(grad_hidden, matrix1.mT, out=grad_bands)
            transform.join(grad_bands, of_split, out)
        return grad_x, *[None] * 5, grad_low_weight, grad_layer1, grad_bias1, grad_layer2, grad_bias2


def _by_block(x: Tensor, blocks: int) -> Tensor:
    """(images * blocks, ...) summed over the images."""
    return x.unflatten(0, (-1, blocks)).sum(0)


def _in_slices(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Each (B, H, W, C) a few images at a time, at least one for each processor."""
    elements = 4 * tensors[0][0].numel()
    most = max(SLICE_ELEMENTS, torch.get_num_threads() * elements)
    size = images_per_slice(len(tensors[0]), elements, most)
    return [tensor.split(size) for tensor in tensors]
