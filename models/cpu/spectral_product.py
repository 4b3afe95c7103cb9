"""The product of spectra and a gate's complex weight, a few images at a time."""

import torch
from torch import Tensor

from .kernels import empty_gradients, images_per_slice, kernel, register_gradients

# Elements of the spectrum per slice: 2 MiB in half precision.
SLICE_ELEMENTS = 2**20


def general_product(spectrum: Tensor, weight: Tensor) -> Tensor:
    """Multiply spectra (B, 2, H, F, C), real parts first, by a complex weight (H, F, C, 2)."""
    (a, b), (c, d) = spectrum.unbind(1), weight.to(spectrum.dtype).unbind(-1)
    return torch.stack((a * c - b * d, a * d + b * c), 1)


@kernel("spectral_product")
def product_in_slices(spectrum: Tensor, weight: Tensor) -> Tensor:
    """Compute `general_product`."""
    y = spectrum.new_empty(spectrum.shape)
    factor = _as_spectrum(weight, spectrum)
    for part, out in zip(_slices(spectrum), _slices(y), strict=True):
        _multiply(part, factor, out)
    return y


@product_in_slices.register_fake
def _empty_result(spectrum, _weight):
    return spectrum.new_empty(spectrum.shape)


@kernel("spectral_product_backward")
def product_backward(grad: Tensor, spectrum: Tensor, weight: Tensor) -> list[Tensor]:
    """Compute the gradients of `general_product`; the weight's accumulates in the weight's precision."""
    grad_spectrum, grad_weight = empty_gradients(spectrum, weight)
    factor = _as_spectrum(weight, spectrum)
    total = weight.new_zeros(factor.shape[1:])
    memory = torch.empty_like(_slices(spectrum)[0])
    for g, part, out in zip(*map(_slices, (grad.contiguous(), spectrum, grad_spectrum)), strict=True):
        _multiply(g, factor, out, conjugate=True)
        products = memory[: len(g)]
        _multiply(g, part, products, conjugate=True)
        total += products.sum(0, dtype=total.dtype)
    grad_weight.copy_(total.movedim(0, -1))
    return [grad_spectrum, grad_weight]


register_gradients(product_in_slices, product_backward, general_product)


def _as_spectrum(weight: Tensor, like: Tensor) -> Tensor:
    """Return the weight as (1, 2, H, F, C), in the dtype of `like`."""
    return weight.to(like.dtype).movedim(-1, 0).contiguous()[None]


def _slices(spectrum: Tensor) -> tuple[Tensor, ...]:
    return spectrum.split(images_per_slice(len(spectrum), spectrum[0].numel(), SLICE_ELEMENTS))


def _multiply(spectrum: Tensor, other: Tensor, out: Tensor, conjugate: bool = False) -> None:
    """Write the complex product of (n, 2, H, F, C) and `other`, or its conjugate, into `out`."""
    (real, imaginary), (other_real, other_imaginary) = spectrum.unbind(1), other.unbind(1)
    sign = -1 if conjugate else 1
    torch.mul(real, other_real, out=out[:, 0]).addcmul_(imaginary, other_imaginary, value=-sign)
    torch.mul(imaginary, other_real, out=out[:, 1]).addcmul_(real, other_imaginary, value=sign)
