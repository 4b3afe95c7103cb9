"""The conditions under which the CPU kernels run, and their registration with autograd."""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import autocast_dtype, autocast_off, full_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# PyTorch has no public functions to query hooks.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_enabled = os.environ.get("SPECTFORMER_CPU_KERNELS", "1") != "0"


def set_cpu_kernels(enable: bool) -> None:
    """Turn the CPU kernels of all models on or off, like `timm.layers.set_fused_attn`.

    Without them, a CPU runs the general implementation of each layer. The environment variable
    SPECTFORMER_CPU_KERNELS=0 turns them off at import.
    """
    global _enabled
    _enabled = enable


def may_run(x: Tensor, weights: Sequence[Tensor] = (), layers: Sequence[nn.Module] = (), half: bool = True) -> bool:
    """Return whether a kernel can replace these layers with these weights for the input x.

    It cannot if x is not on a CPU, if the call is traced, exported or transformed by torch.func, if a layer has a hook
    or an overridden forward, or if weights are quantized or in another precision than x. The kernel computes in
    autocast's precision, or without `half` in full precision.
    """
    return (
        _enabled
        and not isinstance(x, torch.fx.Proxy)
        and not torch.jit.is_tracing()
        and not is_exporting()
        and x.device.type == "cpu"
        and all(map(_is_plain, (x, *weights)))
        and _fits(autocast_dtype(x) if half else full_dtype(x), weights)
        and not any("forward" in vars(layer) for layer in layers)
        and not are_hooked(layers)
    )


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is neither of a subclass (quantized or fake) nor wrapped by a transform."""
    return type(tensor) in (Tensor, nn.Parameter) and (torch.compiler.is_compiling() or not is_transformed(tensor))


def is_exporting() -> bool:
    """Return whether torch.export traces the call; torch 2.11 also reports torch.compile as an export."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_transformed(tensor: Tensor) -> bool:
    """Return whether a torch.func transform wraps the tensor, or `is_grads_batched=True` created it."""
    return torch.func.debug_unwrap(tensor) is not tensor or torch._C._functorch.is_legacy_batchedtensor(tensor)


def _fits(dtype: torch.dtype, weights: Sequence[Tensor]) -> bool:
    """Return whether the weights have the given dtype; float32 weights also fit bfloat16."""
    allowed = (dtype, torch.float32) if dtype == torch.bfloat16 else (dtype,)
    return dtype in DTYPES and all(weight.dtype in allowed for weight in weights)


def are_hooked(layers: Sequence[nn.Module]) -> bool:
    """Return whether there is a hook on one of the layers or on all modules; True if that is unknown."""
    return any(getattr(nn.modules.module, f"_global{name}", True) for name in _HOOKS) or any(
        getattr(layer, name, True) for layer in layers for name in _HOOKS
    )


def images_per_slice(images: int, elements_per_image: int, most: int) -> int:
    """Return the number of images per slice: equal slices of at most `most` elements, at least one image each."""
    parts = math.ceil(images / max(1, most // elements_per_image))
    return max(1, math.ceil(images / max(1, parts)))


def in_slices(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of `size` images of all tensors (B, ...); empty tensors stay unchanged."""
    for first in range(0, len(tensors[0]), size):
        yield tuple(tensor[first : first + size] if tensor.numel() else tensor for tensor in tensors)


def kernel(name: str) -> Callable[[Callable], Any]:
    """Register a function as a custom operator, which torch.compile calls without tracing it."""
    return torch.library.custom_op(f"{__name__.partition('.')[0]}_cpu::{name}", mutates_args=())


def register_gradients(forward: Any, backward: Any, general: Callable[..., Tensor], further: int = 0) -> None:
    """Register the kernel `backward` as the gradient of the kernel `forward`.

    forward(inputs) returns its result. If `further` is not 0, forward(inputs, keep) also returns that many tensors for
    `backward`, empty unless `keep`. backward(gradient, further tensors, inputs) returns the gradients of all inputs.

    `general(*inputs)`, the general implementation, is differentiated instead of calling `backward` if the backward pass
    is itself differentiated (`create_graph=True`) or the gradient is transformed by vmap. So kernels need no formulas
    for second derivatives and batched gradients.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        results = output[1:] if further else ()
        ctx.mark_non_differentiable(*results)
        ctx.set_materialize_grads(False)  # avoids allocating zero gradients on every step
        ctx.save_for_backward(*results, *inputs[0])

    def gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[list[Tensor | None] | None, ...]:
        saved = ctx.saved_tensors  # read once: gradient checkpointing allows no second access
        results, inputs = saved[:further], saved[further:]
        if gradient is None:
            found = [None] * len(inputs)
        elif torch.is_grad_enabled() or is_transformed(gradient):
            found = _differentiate(general, inputs, gradient)
        else:
            found = backward(gradient, results, inputs)
        return (found, None) if further else (found,)  # `keep` has no gradient

    forward.register_autograd(gradients, setup_context=setup_context)
    backward.register_fake(lambda _gradient, _results, inputs: empty_gradients(inputs))


def empty_gradients(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Allocate the gradients of all inputs."""
    return [tensor.new_empty(tensor.shape) for tensor in inputs]


def _differentiate(function: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> list[Tensor | None]:
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), autocast_off(gradient):
        found = iter(torch.autograd.grad(function(*inputs), wanted, gradient, create_graph=create_graph))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
