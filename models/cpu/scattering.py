"""The scattering mixer with channel blending in slices of a few images.

All steps share buffers that stay in cache. Both passes are made of the same two steps, `split` and `join`: one is the
transpose of the other. Sums and differences run over long stretches of memory, in planes of real and of imaginary parts
with whole rows of channels side by side; from there each block of channels is copied once to where the matrix products
find it in one piece.
"""

from collections.abc import Iterator

import torch
from timm.models import register_notrace_module
from torch import Tensor

from .. import scattering
from ..layers import autocast_off
from ..scattering import EinsteinBlending, real_bias, real_matrix
from ..wavelet import DTCWT, analysis_matrix, fitting, images_of, synthesis_matrix
from .operations import of_first_result, operation, save_for_backward
from .slicing import images_per_slice, may_slice

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
        signal = self.spectral_input(x)
        wavelet, blend, (height, width) = self.wavelet, self.channel_blend, self.grid_size
        filters = (
            fitting(wavelet.analysis_height, analysis_matrix, height, signal),
            fitting(wavelet.analysis_width, analysis_matrix, width, signal),
            fitting(wavelet.synthesis_height, synthesis_matrix, height, signal),
            fitting(wavelet.synthesis_width, synthesis_matrix, width, signal),
        )
        with autocast_off(x):
            # The low-pass image is multiplied by sqrt(2) going in and coming out.
            low_weight = 2 * _even_then_odd(self.low_pass)
            layers = (
                real_matrix(blend.weight1),
                real_bias(blend.bias1),
                real_matrix(blend.weight2),
                real_bias(blend.bias2),
            )
        return scatter(signal, torch.is_grad_enabled(), *filters, low_weight, *layers)[0]

    def _slices(self, x: Tensor) -> bool:
        """Whether that may be, and nobody put another layer in the place of one."""
        if self.mixing != "channel":
            return False
        layers = (self.wavelet, self.channel_blend)
        weights = (self.low_pass, *self.channel_blend.parameters())
        return (
            (type(self.wavelet), type(self.channel_blend)) == (DTCWT, EinsteinBlending)
            and may_slice(x, weights, layers, half=self.spectral_precision == "half")
            and x.shape[1:3] == self.grid_size
        )


def _even_then_odd(image: Tensor) -> Tensor:
    """(H, W, C) with its even rows before its odd ones, and its even columns before its odd ones."""
    return image.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(1, 0, 3, 2, 4).reshape(image.shape)


class _Transform:
    """Splits images (n, H, W, C) into low-pass image and bands, and joins them, in memory used again and again.

    `low` is the low-pass image divided by sqrt(2), even rows and columns before odd ones. It stays where the filters
    leave it. Bands are (n * blocks, 6hw, 2 * size), what the layers multiply, real parts before imaginary ones; the
    order of their positions is of no matter here.
    """

    def __init__(self, like: Tensor, split_filters: Filters, join_filters: Filters, blocks: int):
        (height, _), (width, width_of_image) = (matrix.shape for matrix in split_filters)
        images, channels = len(like), like.shape[3]
        self.split_filters, self.join_filters = split_filters, join_filters
        self.half = like.new_empty(images, height, width_of_image, channels)  # filtered along its height alone
        self.filtered = like.new_empty(images, height, width, channels)
        self.low = self.filtered[:, : height // 2, : width // 2]
        planes = like.new_empty(2, images, 6, height // 4, width // 4, channels)  # real and imaginary parts
        self.planes_by_block = planes.flatten(2, 4).unflatten(3, (blocks, -1)).transpose(2, 3)
        # Each high-pass image's squares and its two bands, (n, h, w, C) each.
        bands = [tuple(plane) for plane in planes.unbind(2)]
        self.high_pass = tuple(zip(images_of(self.filtered)[1:], bands[:3], bands[3:], strict=True))

    def split(self, x: Tensor, bands: Tensor) -> None:
        """Filter x into `low` and the bands."""
        height, width = self.split_filters
        _multiply(height, x.flatten(2), out=self.half.flatten(2))
        _multiply(width, self.half.flatten(0, 1), out=self.filtered.flatten(0, 1))
        for (a, b, c, d), (real1, imaginary1), (real2, imaginary2) in self.high_pass:
            torch.sub(a, d, out=real1)
            torch.add(b, c, out=imaginary1)
            torch.add(a, d, out=real2)
            torch.sub(b, c, out=imaginary2)
        for part, plane in self._parts(bands):
            part.copy_(plane)

    def join(self, bands: Tensor, y: Tensor) -> None:
        """The transpose of `split` where its filters are transposed, of `low` and the bands, into y."""
        for part, plane in self._parts(bands):
            plane.copy_(part)
        for (a, b, c, d), (real1, imaginary1), (real2, imaginary2) in self.high_pass:
            torch.add(real1, real2, out=a)
            torch.add(imaginary1, imaginary2, out=b)
            torch.sub(imaginary1, imaginary2, out=c)
            torch.sub(real2, real1, out=d)
        height, width = self.join_filters
        _multiply(width, self.filtered.flatten(0, 1), out=self.half.flatten(0, 1))
        _multiply(height, self.half.flatten(2), out=y.flatten(2))

    def _parts(self, bands: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Real and imaginary part of bands, and the planes of them, (n, blocks, 6hw, size) each."""
        real_and_imaginary = bands.view(len(self.filtered), -1, *bands.shape[1:]).chunk(2, -1)
        return zip(real_and_imaginary, self.planes_by_block, strict=True)


def _multiply(matrix: Tensor, batch: Tensor, out: Tensor) -> Tensor:
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch, out=out)


def _bands_shape(filters: Filters, layer: Tensor) -> tuple[int, int, int]:
    """(blocks, 6hw, 2 * size) of an image."""
    (height, _), (width, _) = (matrix.shape for matrix in filters)
    return len(layer), 6 * (height // 4) * (width // 4), layer.shape[2]


@operation("scatter")
def scatter(
    x: Tensor,
    keep: bool,
    analysis_height: Tensor,
    analysis_width: Tensor,
    synthesis_height: Tensor,
    synthesis_width: Tensor,
    low_weight: Tensor,
    layer1: Tensor,
    bias1: Tensor,
    layer2: Tensor,
    bias2: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, H, W, C) with the transform's matrices, the weight of `_Transform.low` and two real layers, scattered.

    The layers' matrices are (blocks, 2 * size, 2 * size), their biases (blocks, 2 * size). With the result come, where
    there may be a backward pass (`keep`), the coefficients of x, which it needs; else empty tensors.
    """
    weights = (
        analysis_height,
        analysis_width,
        synthesis_height,
        synthesis_width,
        low_weight,
        layer1,
        bias1,
        layer2,
        bias2,
    )
    y, low, bands = _empty_results(x, keep, *weights)
    *matrices, low_weight, layer1, bias1, layer2, bias2 = (weight.to(x.dtype) for weight in weights)
    analysis, synthesis = matrices[:2], matrices[2:]
    images = 0
    for part, out, kept_low, kept in _in_slices(x.contiguous(), y, low, bands):
        if len(part) != images:
            images = len(part)
            transform = _Transform(part, analysis, synthesis, len(layer1))
            blended, hidden = part.new_empty(2, images, *_bands_shape(analysis, layer1)).flatten(1, 2)
            first, first_bias, second, second_bias = _of_images(images, layer1, bias1, layer2, bias2)
        coefficients = kept.flatten(0, 1) if keep else blended
        transform.split(part, coefficients)
        if keep:
            kept_low.copy_(transform.low)
        transform.low.mul_(low_weight)
        torch.baddbmm(first_bias, coefficients, first, out=hidden).relu_()
        torch.baddbmm(second_bias, hidden, second, out=blended)
        transform.join(blended, out)
    return y, low, bands


@scatter.register_fake
def _empty_results(x, keep, analysis_height, analysis_width, _sh, _sw, low_weight, layer1, *_):
    """Room for what `scatter` gives."""
    sizes = low_weight.shape, _bands_shape((analysis_height, analysis_width), layer1)
    return x.new_empty(x.shape), *(x.new_empty((x.shape[0], *size) if keep else (0,)) for size in sizes)


@operation("scatter_backward")
def scatter_backward(
    grad: Tensor,
    low: Tensor,
    bands: Tensor,
    analysis_height: Tensor,
    analysis_width: Tensor,
    synthesis_height: Tensor,
    synthesis_width: Tensor,
    low_weight: Tensor,
    layer1: Tensor,
    bias1: Tensor,
    layer2: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the low-pass weight, and both layers' matrices and biases. These add up in their own dtype."""
    weights = analysis_height, analysis_width, synthesis_height, synthesis_width, low_weight, layer1, bias1, layer2
    grads = _empty_gradients(grad, low, bands, *weights)
    grad_x, *totals = grads[0], *(total.zero_() for total in grads[1:])
    grad_low_weight, grad_layer1, grad_bias1, grad_layer2, grad_bias2 = totals
    *matrices, low_weight, layer1, bias1, layer2 = (weight.to(grad.dtype) for weight in weights)
    of_split, of_join = ([matrix.T.contiguous() for matrix in filters] for filters in (matrices[:2], matrices[2:]))
    images = 0
    for part, out, kept_low, kept in _in_slices(grad.contiguous(), grad_x, low, bands):
        coefficients = kept.flatten(0, 1)
        if len(part) != images:
            images = len(part)
            transform = _Transform(part, of_join, of_split, len(layer1))
            grad_bands, hidden, grad_hidden = part.new_empty(3, *coefficients.shape)
            first, first_bias, second = _of_images(images, layer1, bias1, layer2)
        transform.split(part, grad_bands)
        grad_low_weight += (kept_low * transform.low).sum(0, dtype=grad_low_weight.dtype)
        transform.low.mul_(low_weight)
        torch.baddbmm(first_bias, coefficients, first, out=hidden).relu_()
        torch.bmm(grad_bands, second.mT, out=grad_hidden)
        torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
        for total, of_each in (
            (grad_layer2, hidden.mT @ grad_bands),
            (grad_bias2, grad_bands.sum(1)),
            (grad_layer1, coefficients.mT @ grad_hidden),
            (grad_bias1, grad_hidden.sum(1)),
        ):
            total += of_each.view(images, *total.shape).sum(0, dtype=total.dtype)
        torch.bmm(grad_hidden, first.mT, out=grad_bands)
        transform.join(grad_bands, out)
    return grads


@scatter_backward.register_fake
def _empty_gradients(grad, _low, _bands, _ah, _aw, _sh, _sw, low_weight, layer1, bias1, layer2):
    """Room for what `scatter_backward` gives."""
    weights = (low_weight, layer1, bias1, layer2, bias1)
    return (grad.new_empty(grad.shape), *(weight.new_empty(weight.shape) for weight in weights))


def _keep(ctx, inputs, output):
    _, _, *weights, _ = inputs
    save_for_backward(ctx, output[1:], *weights)


@of_first_result
def _gradients(ctx, grad):
    grad_x, *weights = scatter_backward(grad, *ctx.saved_tensors)
    return grad_x, *[None] * 5, *weights


scatter.register_autograd(_gradients, setup_context=_keep)


def _of_images(images: int, *weights: Tensor) -> Iterator[Tensor]:
    """Layers' matrices and biases (blocks, ...) for each block of each image, (n * blocks, 1 or 2 * size, 2 * size)."""
    for weight in weights:
        matrix = weight[:, None] if weight.dim() == 2 else weight
        yield matrix.repeat(images, 1, 1)


def _in_slices(x: Tensor, y: Tensor, low: Tensor, bands: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Grids, low-pass images and bands of a few images at a time, at least one for each processor.

    Empty tensors stay as they are.
    """
    elements = 4 * x[0].numel()
    size = images_per_slice(len(x), elements, max(SLICE_ELEMENTS, torch.get_num_threads() * elements))
    for first in range(0, len(x), size):
        part = slice(first, first + size)
        yield x[part], y[part], low[part], bands[part]
