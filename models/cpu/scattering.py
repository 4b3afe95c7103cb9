"""The scattering mixer with channel blending, a few images at a time.

All steps share buffers that stay in cache. The forward and the backward pass use the same two steps, `split` and
`join`, which are transposes of each other. Sums and differences run over long contiguous memory, in separate planes for
real and imaginary parts that contain all channels. Each block of channels is then copied once to contiguous memory for
the matrix products.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..blending import EinsteinBlending, blend_channels
from ..matrices import matrix
from ..precision import full_precision, to_autocast
from ..wavelet import analyse, analysis_matrix, synthesis_matrix, synthesise
from .kernels import empty_gradients, images_per_slice, in_slices, kernel, may_run, register_gradients

# Elements of the transform per slice, 4HWC per image: 4 MiB in float32, the fastest of 2 to 16 MiB.
SLICE_ELEMENTS = 2**20

Filters = tuple[Tensor, Tensor]  # the matrices that filter the height and the width


def scatter(x: Tensor, low_pass: Tensor, blend: EinsteinBlending, half: bool) -> Tensor | None:
    """Compute `ScatteringMixer` with channel blending on (B, H, W, C); return None if the kernel cannot run."""
    if not may_run(x, (low_pass, *blend.parameters()), (blend,), half=half):
        return None
    signal = to_autocast(x) if half else full_precision(x)
    return scatter_in_slices([signal, low_pass, *blend.real_layers()], torch.is_grad_enabled())[0]


def general_scatter(x: Tensor, low_pass: Tensor, *layers: Tensor) -> Tensor:
    """Transform tokens (B, H, W, C), multiply by `low_pass` (H', W', C), apply two real layers, transform back."""
    low, bands = analyse(x)
    return synthesise(low * low_pass.to(x.dtype), blend_channels(bands, *layers), x.shape[1:3])


def _even_then_odd(image: Tensor) -> Tensor:
    """Reorder (H, W, C): even rows before odd rows, even columns before odd columns."""
    return image.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(1, 0, 3, 2, 4).reshape(image.shape)


def _in_order(image: Tensor) -> Tensor:
    """Invert `_even_then_odd`."""
    return image.unflatten(1, (2, -1)).unflatten(0, (2, -1)).permute(1, 0, 3, 2, 4).reshape(image.shape)


# The pixels a b above c d of all 2x2 squares of an image, (B, H/2, W/2, C) each. In a high-pass image, each square
# gives two complex numbers.
Square = tuple[Tensor, Tensor, Tensor, Tensor]


def _high_pass(filtered: Tensor) -> tuple[Square, Square, Square]:
    """Return the high-pass images in a grid (B, 2H, 2W, C) filtered along both axes, as views in band order.

    Each axis has the even and odd low-pass samples, then the even and odd high-pass samples.
    """
    rows = filtered.unflatten(1, (4, -1)).unbind(1)
    low_even, low_odd, high_even, high_odd = (row.unflatten(2, (4, -1)).unbind(2) for row in rows)
    return (
        (*high_even[:2], *high_odd[:2]),
        (*high_even[2:], *high_odd[2:]),
        (*low_even[2:], *low_odd[2:]),
    )


class _Transform:
    """Splits images (n, H, W, C) into low-pass image and bands and joins them, in reused memory.

    `low` is the low-pass image divided by sqrt(2), even rows and columns before odd ones, a view of the filters'
    output. Bands are (n * blocks, 6hw, 2 * size), as the layers need them, real parts before imaginary parts. The order
    of their positions does not matter here.
    """

    def __init__(self, like: Tensor, split_filters: Filters, join_filters: Filters, blocks: int):
        (height, _), (width, width_of_image) = (matrix.shape for matrix in split_filters)
        images, channels = len(like), like.shape[3]
        self.split_filters, self.join_filters = split_filters, join_filters
        self.half = like.new_empty(images, height, width_of_image, channels)  # filtered only along the height
        self.filtered = like.new_empty(images, height, width, channels)
        self.low = self.filtered[:, : height // 2, : width // 2]
        planes = like.new_empty(2, images, 6, height // 4, width // 4, channels)  # real and imaginary parts
        self.planes_by_block = planes.flatten(2, 4).unflatten(3, (blocks, -1)).transpose(2, 3)
        # Each high-pass image's squares and its two bands, (n, h, w, C) each.
        bands = [tuple(plane) for plane in planes.unbind(2)]
        self.high_pass = tuple(zip(_high_pass(self.filtered), bands[:3], bands[3:], strict=True))

    def split(self, x: Tensor, bands: Tensor) -> None:
        """Filter x; write `low` and the bands."""
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
        """Join `low` and the bands and write y; with transposed filters, this is the transpose of `split`."""
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
        """Pair the real and imaginary part of the bands with their planes, (n, blocks, 6hw, size) each."""
        real_and_imaginary = bands.view(len(self.filtered), -1, *bands.shape[1:]).chunk(2, -1)
        return zip(real_and_imaginary, self.planes_by_block, strict=True)


def _multiply(matrix: Tensor, batch: Tensor, out: Tensor) -> Tensor:
    return torch.bmm(matrix.expand(len(batch), -1, -1), batch, out=out)


def _bands_shape(x: Tensor, layer: Tensor) -> tuple[int, int, int]:
    """Return the shape (blocks, 6hw, 2 * size) of an image's bands."""
    return len(layer), 6 * ((x.shape[1] + 1) // 2) * ((x.shape[2] + 1) // 2), layer.shape[2]


@kernel("scatter")
def scatter_in_slices(inputs: Sequence[Tensor], keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `general_scatter`; with `keep`, also return the coefficients for backward, else empty tensors."""
    y, low, bands = _empty_results(inputs, keep)
    x, low_pass, *layers = inputs
    analysis, synthesis = _filters(analysis_matrix, x), _filters(synthesis_matrix, x)
    low_weight, layer1, bias1, layer2, bias2 = (weight.to(x.dtype) for weight in (_of_low(low_pass), *layers))
    images = 0
    for part, out, kept_low, kept in _in_slices(x.contiguous(), y, low, bands):
        if len(part) != images:
            images = len(part)
            transform = _Transform(part, analysis, synthesis, len(layer1))
            blended, hidden = part.new_empty(2, images, *_bands_shape(x, layer1)).flatten(1, 2)
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


@scatter_in_slices.register_fake
def _empty_results(inputs, keep):
    x, low_pass, layer1, *_ = inputs
    sizes = low_pass.shape, _bands_shape(x, layer1)
    return x.new_empty(x.shape), *(x.new_empty((x.shape[0], *size) if keep else (0,)) for size in sizes)


@kernel("scatter_backward")
def scatter_backward(grad: Tensor, results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute the gradients of the inputs; those of weights accumulate in the weights' precision."""
    low, bands = results
    x, low_pass, *layers = inputs
    low_weight, layer1, bias1, layer2, _bias2 = (weight.to(x.dtype) for weight in (_of_low(low_pass), *layers))
    grads = empty_gradients(inputs)
    grad_x, grad_low_pass, *totals = grads
    grad_layer1, grad_bias1, grad_layer2, grad_bias2 = (total.zero_() for total in totals)
    of_split, of_join = (
        tuple(matrix.T.contiguous() for matrix in _filters(build, x)) for build in (analysis_matrix, synthesis_matrix)
    )
    grad_low_weight = torch.zeros_like(low_pass)
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
    grad_low_pass.copy_(2 * _in_order(grad_low_weight))
    return grads


register_gradients(scatter_in_slices, scatter_backward, general_scatter, further=2)


def _filters(build, x: Tensor) -> Filters:
    return matrix(build, x.shape[1], like=x), matrix(build, x.shape[2], like=x)


def _of_low(low_pass: Tensor) -> Tensor:
    """Return the weight for `_Transform.low`, doubled because `low` is divided by sqrt(2) in both directions."""
    return 2 * _even_then_odd(low_pass)


def _of_images(images: int, *weights: Tensor) -> Iterator[Tensor]:
    """Repeat the layers' matrices and biases (blocks, ...) per image: (n * blocks, 1 or 2 * size, 2 * size)."""
    for weight in weights:
        matrix = weight[:, None] if weight.dim() == 2 else weight
        yield matrix.repeat(images, 1, 1)


def _in_slices(x: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield grids (B, H, W, C) and tensors that belong to them for a few images at a time, at least one per thread."""
    elements = 4 * x[0].numel()
    most = max(SLICE_ELEMENTS, torch.get_num_threads() * elements)
    return in_slices(images_per_slice(len(x), elements, most), x, *others)
