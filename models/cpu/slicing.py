"""When a layer runs a few images at a time, and how many."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .private import are_hooked


def may_slice(x: Tensor, weights: Sequence[Tensor | None], layers: tuple[nn.Module, ...]) -> bool:
    """Whether x may pass by the layers, whose weights (or None) these are, and be computed with in slices.

    So it is in full precision on a CPU, if nobody traces or transforms the calls, listens to the layers, or has
    changed what one does or has weights of.
    """
    return (
        not isinstance(x, torch.fx.Proxy)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and all(tensor is None or (_is_plain(tensor) and tensor.dtype == x.dtype) for tensor in (x, *weights))
        and not any("forward" in vars(layer) for layer in layers)
        and not are_hooked(layers)
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: of no subclass, as quantised weights are, and wrapped by no transform."""
    return type(tensor) in (Tensor, nn.Parameter) and torch.func.debug_unwrap(tensor) is tensor


def run(function: type[torch.autograd.Function], x: Tensor, *weights: Tensor | None) -> Tensor:
    """The first result of a function of x, of whether there may be a backward pass, and of weights."""
    if torch.is_grad_enabled():
        return function.apply(x, True, *weights)[0]
    return function.forward(x, False, *weights)[0]  # which spares a tenth of a millisecond


def images_per_slice(images: int, elements_per_image: int, most: int) -> int:
    """How many of some images to take at a time: equal parts of at most `most` elements, or one by one."""
    parts = math.ceil(images / max(1, most // elements_per_image))
    return max(1, math.ceil(images / max(1, parts)))
