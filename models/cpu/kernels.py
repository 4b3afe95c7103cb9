"""When the CPU kernels run, and the one rule by which all of them are differentiated."""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import autocast_dtype, autocast_off, full_dtype

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
# Hooks can be registered and removed by public functions, but not queried.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_enabled = os.environ.get("SPECTFORMER_CPU_KERNELS", "1") != "0"


def set_cpu_kernels(enable: bool) -> None:
    """Switch the CPU kernels of all models on or off, like `timm.layers.set_fused_attn`.

    Without them a CPU runs the general formulation of each layer. SPECTFORMER_CPU_KERNELS=0 in the environment switches
    them off from the start.
    """
    global _enabled
    _enabled = enable


def may_run(
    x: Tensor, weights: Sequence[Tensor | None] = (), layers: tuple[nn.Module, ...] = (), half: bool = True
) -> bool:
    """Whether a kernel may compute on x, on a CPU, what these layers do with these weights.

    Not where the call is traced, exported or transformed by torch.func, a layer has a hook or a forward of its own, or
    weights are quantised or in another precision than x. The kernel computes in the precision of autocast, or without
    `half` in full precision.
    """
    return (
        _enabled
        and not isinstance(x, torch.fx.Proxy)
        and not torch.jit.is_tracing()
        and not is_exporting()
        and x.device.type == "cpu"
        and all(tensor is None or _is_plain(tensor) for tensor in (x, *weights))
        and _fits(autocast_dtype(x) if half else full_dtype(x), weights)
        and not any("forward" in vars(layer) for layer in layers)
        and not are_hooked(layers)
    )


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is of no subclass, as quantised and fake ones are, and wrapped by no transform."""
    return type(tensor) in (Tensor, nn.Parameter) and (torch.compiler.is_compiling() or not is_transformed(tensor))


def is_exporting() -> bool:
    """Whether torch.export traces the call; torch 2.11 calls torch.compile an export, too."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def is_transformed(tensor: Tensor) -> bool:
    """Whether a transform of torch.func wraps the tensor, or it is one of `is_grads_batched=True`."""
    return torch.func.debug_unwrap(tensor) is not tensor or torch._C._functorch.is_legacy_batchedtensor(tensor)


def _fits(dtype: torch.dtype, weights: Sequence[Tensor | None]) -> bool:
    """Whether the weights are in that precision, or in float32 where that is bfloat16."""
    allowed = (dtype, torch.float32) if dtype == torch.bfloat16 else (dtype,)
    return dtype in DTYPES and all(weight is None or weight.dtype in allowed for weight in weights)


def are_hooked(layers: tuple[nn.Module, ...]) -> bool:
    """Whether one of the layers, or every module there is, has a hook; True where that cannot be seen."""
    return any(getattr(nn.modules.module, f"_global{name}", True) for name in _HOOKS) or any(
        getattr(layer, name, True) for layer in layers for name in _HOOKS
    )


def images_per_slice(images: int, elements_per_image: int, most: int) -> int:
    """How many images to take at a time: equal parts of at most `most` elements, at least one image each."""
    parts = math.ceil(images / max(1, most // elements_per_image))
    return max(1, math.ceil(images / max(1, parts)))


def kernel(name: str) -> Callable[[Callable], Any]:
    """Makes a function an operation of torch.library, which torch.compile calls and does not look into."""
    return torch.library.custom_op(f"{__name__.partition('.')[0]}_cpu::{name}", mutates_args=())


def register_gradients(forward: Any, backward: Any, general: Callable[..., Tensor], further: int = 0) -> None:
    """Register the kernel `backward` as the gradient of the kernel `forward`.

    forward(*inputs), or forward(*inputs, keep), returns its result alone, or with so many further tensors that only
    `backward` needs: empty ones unless `keep`. backward(gradient, *further, *inputs) fills `empty_gradients(*inputs)`.

    Second derivatives and batched gradients are those of `general(*inputs)`, the general formulation: it runs where the
    backward pass is to be differentiated (`create_graph=True`) or the gradient is transformed by vmap. So no kernel
    needs formulas of its own for these.
    """

    def setup_context(ctx: Any, inputs: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        results = output[1:] if further else ()
        ctx.mark_non_differentiable(*results)
        ctx.set_materialize_grads(False)  # else each of them gets a gradient of zeros on every step
        ctx.save_for_backward(*results, *(tensor for tensor in inputs if not isinstance(tensor, bool)))

    def gradients(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        nothing = (None,) * len(ctx.needs_input_grad)
        if gradient is None:
            return nothing
        saved = ctx.saved_tensors  # once: gradient checkpointing allows no more
        inputs = saved[further:]
        if torch.is_grad_enabled() or is_transformed(gradient):
            found = _differentiate(general, inputs, gradient)
        else:
            filled = iter(backward(gradient, *saved))
            found = [None if tensor is None else next(filled) for tensor in inputs]
        return (*found, *nothing[len(found) :])  # `keep` has none

    forward.register_autograd(gradients, setup_context=setup_context)
    backward.register_fake(lambda _gradient, *tensors: empty_gradients(*tensors[further:]))


def empty_gradients(*inputs: Tensor | None) -> list[Tensor]:
    """Memory for the gradients of all inputs that are not None."""
    return [tensor.new_empty(tensor.shape) for tensor in inputs if tensor is not None]


def _differentiate(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], gradient: Tensor
) -> list[Tensor | None]:
    wanted = [tensor is not None and tensor.requires_grad for tensor in inputs]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), autocast_off(gradient):
        variables = [tensor for tensor, want in zip(inputs, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(function(*inputs), variables, gradient, create_graph=create_graph))
    return [next(found) if want else None for want in wanted]
