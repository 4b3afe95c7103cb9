"""The product of spectra and a gate's complex weight, a few images at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import empty_gradients, images_per_slice, in_slices, kernel, register_gradients

# Elements of the spectrum per slice: 2 MiB in half precision.
SLICE_ELEMENTS = 2**20


def general_product(spectrum: Tensor, weight: Tensor) -> Tensor:
    """Multiply spectra (B, 2, H, F, C), real parts first, by a complex weight (H, F, C, 2)."""
    (a, b), (c, d) = spectrum.unbind(1), weight.to(spectrum.dtype).unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), 1)


@kernel("spectral_product")
def product_in_slices(inputs: Sequence[Tensor]) -> Tensor:
    """Compute `general_product`."""
    spectrum, weight = inputs
    y = spectrum.new_empty(spectrum.shape)
    factor = _as_spectrum(weight, spectrum)
    for part, out in in_slices(_slice_size(spectrum), spectrum, y):
        _multiply(part, factor, out)
    return y


@kernel("spectral_product_backward")
def product_backward(grad: Tensor, _: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute the gradients of `general_product`; the weight's accumulates in the weight's precision."""
    spectrum, weight = inputs
    grad_spectrum, grad_weight = empty_gradients(inputs)
    factor = _as_spectrum(weight, spectrum)
    total = weight.new_zeros(factor.shape[1:])
    size = _slice_size(spectrum)
    memory = spectrum.new_empty(size, *spectrum.shape[1:])
    for g, part, out in in_slices(size, grad.contiguous(), spectrum, grad_spectrum):
        _multiply(g, factor, out, conjugate=True)
        products = memory[: len(g)]
        _multiply(g, part, products, conjugate=True)
        total += products.sum(0, dtype=total.dtype)
    grad_weight.copy_(total.movedim(0, -1))
    return [grad_spectrum, grad_weight]


product_in_slices.register_fake(lambda inputs: inputs[0].new_empty(inputs[0].shape))
register_gradients(product_in_slices, product_backward, general_product)


def _as_spectrum(weight: Tensor, like: Tensor) -> Tensor:
    """Return the weight as (1, 2, H, F, C), in the dtype of `like`."""
    return weight.to(like.dtype).movedim(-1, 0).contiguous()[None]


def _slice_size(spectrum: Tensor) -> int:
    return images_per_slice(len(spectrum), spectrum[0].numel(), SLICE_ELEMENTS)


def _multiply(spectrum: Tensor, other: Tensor, out: Tensor, conjugate: bool = False) -> None:
    """Write the complex product of (n, 2, H, F, C) and `other`, or its conjugate, into `out`."""
    (real, imaginary), (other_real, other_imaginary) = spectrum.unbind(1), other.unbind(1)
    sign = -1 if conjugate else 1
    torch.mul(real, other_real, out=out[:, 0]).addcmul_(imaginary, other_imaginary, value=-sign)
    torch.mul(imaginary, other_real, out=out[:, 1]).addcmul_(real, other_imaginary, value=sign)
