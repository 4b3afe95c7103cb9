"""When a layer runs a few images at a time.

On a CPU, moving large intermediate results through memory, and asking the system for fresh pages to put them in,
costs more than the arithmetic on them. The feed-forward network and the scattering mixer therefore have a second
formulation, which takes a few images through all of their steps while these are in cache. It is the same
arithmetic; everywhere else, and when compiled, the plain formulation runs.
"""

import math

import torch
from torch import Tensor, nn


def may_slice(x: Tensor, *layers: nn.Module) -> bool:
    """Whether x, in full precision on a CPU, may pass the layers by: nobody traces them or has hooked them."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and not torch._C._are_functorch_transforms_active()
        and not any(map(_is_hooked, layers))
    )


def _is_hooked(layer: nn.Module) -> bool:
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def images_a_slice(images: int, elements_an_image: int, most: int) -> int:
    """How many of some images to take at a time: equal parts of at most `most` elements, or one by one."""
    parts = math.ceil(images / max(1, most // elements_an_image))
    return max(1, math.ceil(images / max(1, parts)))
