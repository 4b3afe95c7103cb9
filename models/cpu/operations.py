"""Layers as operations of torch.library, and what they keep for their backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def operation(name: str) -> Callable[[Callable], Any]:
    """Makes a function an operation of this package's that torch.compile calls and does not look into."""
    return torch.library.custom_op(f"{__name__.partition('.')[0]}_cpu::{name}", mutates_args=())


def save_for_backward(ctx: Any, results: Sequence[Tensor], *inputs: Tensor | None) -> None:
    """For the backward pass keep these inputs of an operation, and these results, which are for nothing else."""
    ctx.mark_non_differentiable(*results)
    ctx.set_materialize_grads(False)  # else each such result has a gradient of zeros, of its size, made on every step
    ctx.save_for_backward(*results, *inputs)


def of_first_result(gradients: Callable) -> Callable:
    """The backward pass of an operation whose further results `save_for_backward` keeps: from the first's gradient."""

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.needs_input_grad) if grad is None else gradients(ctx, grad)

    return backward
