"""When a layer runs a few images at a time, in which precision, and how many."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers import autocast_dtype, full_dtype
from .private import are_hooked

DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def may_slice(
    x: Tensor, weights: Sequence[Tensor | None] = (), layers: tuple[nn.Module, ...] = (), half: bool = True
) -> bool:
    """Whether x may pass by the layers, whose weights (or None) these are, and be computed with in slices.

    So it is on a CPU, if nobody traces, exports or transforms the calls, listens to the layers, or has changed what
    one does or has weights of, in the precision of autocast, or without `half` in full precision.
    """
    return (
        not isinstance(x, torch.fx.Proxy)
        and not torch.jit.is_tracing()
        and not torch.compiler.is_exporting()
        and x.device.type == "cpu"
        and all(tensor is None or _is_plain(tensor) for tensor in (x, *weights))
        and _is_precise_enough(autocast_dtype(x) if half else full_dtype(x), weights)
        and not any("forward" in vars(layer) for layer in layers)
        and not are_hooked(layers)
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is what it seems: of no subclass, as quantised weights are, and wrapped by no transform."""
    if type(tensor) not in (Tensor, nn.Parameter):
        return False
    return torch.compiler.is_compiling() or torch.func.debug_unwrap(tensor) is tensor


def _is_precise_enough(dtype: torch.dtype, weights: Sequence[Tensor | None]) -> bool:
    """Whether the weights are in that precision, or in full precision where that is half precision."""
    fitting = (dtype, torch.float32) if dtype == torch.bfloat16 else (dtype,)
    return dtype in DTYPES and all(weight is None or weight.dtype in fitting for weight in weights)


def images_per_slice(images: int, elements_per_image: int, most: int) -> int:
    """How many of some images to take at a time: equal parts of at most `most` elements, or one by one."""
    parts = math.ceil(images / max(1, most // elements_per_image))
    return max(1, math.ceil(images / max(1, parts)))
