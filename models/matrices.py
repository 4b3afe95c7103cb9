"""Matrices that depend on nothing but the sizes of a grid, computed once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor, nn

from .cpu import is_exporting, is_transformed, may_run

Build = Callable[..., Tensor]
_builders: dict[str, Build] = {}


def builder(build: Build) -> Build:
    """Decorates build(*sizes), which returns a float64 matrix on the CPU, for `matrix` to be called with it."""
    _builders[build.__name__] = build
    return build


def matrix(build: Build, *sizes: int, like: Tensor) -> Tensor:
    """`build(*sizes)` in the dtype and on the device of `like`.

    No buffer of a module: DDP would broadcast it on every step, and a cast to half precision would round it. Where an
    export leaves sizes open, the graph computes it.
    """
    if is_exporting() and not all(isinstance(size, int) for size in sizes):
        return build(*sizes).to(like)
    if torch.compiler.is_compiling() and not is_exporting():
        return _in_graph(build.__name__, sizes, like.dtype, like.device)
    if type(like) in (Tensor, nn.Parameter):
        return _computed(build, sizes, like.dtype, like.device)
    return _computed(build, sizes, like.dtype, torch.device("cpu")).to(like.device)  # fake tensors need no device


@lru_cache(maxsize=256)
def _computed(build: Build, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # In a thread of its own, where none of the caller's modes is on: a matrix that was built under inference mode, on
    # fake tensors or inside a transform of torch.func would be of no use to the next caller.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: build(*sizes).to(device, dtype)).result()


@torch.library.custom_op(f"{__name__.partition('.')[0]}::matrix", mutates_args=())
def _in_graph(name: str, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`matrix` in a compiled graph, which may write into what it is given: a copy."""
    return _computed(_builders[name], tuple(sizes), dtype, device).clone()


@_in_graph.register_fake
def _(name, sizes, dtype, device):
    return _builders[name](*sizes).to(device, dtype)


def multiply(matrix: Tensor, batch: Tensor, add: Tensor | None = None) -> Tensor:
    """(n, m) matrix times each (m, k) of a batch, plus `add` (batch, n, k). In float32 without TF32."""
    if batch.dtype == torch.bfloat16 and matrix.numel() > batch[0].numel() and add is None and may_run(batch):
        # A CPU would copy the matrix for each of the batch. Its own part is smaller: all become columns of one product.
        product = matrix @ batch.transpose(0, 1).flatten(1)
        return product.unflatten(1, (batch.shape[0], -1)).transpose(0, 1).contiguous()
    matrix = matrix.expand(batch.shape[0], -1, -1)
    if batch.is_cuda and batch.dtype == torch.float32 and not is_transformed(batch):
        product = float32_product(matrix, batch)
        return product if add is None else product + add
    return torch.bmm(matrix, batch) if add is None else torch.baddbmm(add, matrix, batch)


@torch.library.custom_op(f"{__name__.partition('.')[0]}::float32_product", mutates_args=())
def float32_product(one: Tensor, other: Tensor) -> Tensor:
    """`torch.bmm` without TF32, whatever the precision of float32 products is, and so are its gradients."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        return torch.bmm(one, other)
    finally:
        settings.fp32_precision = before


@float32_product.register_fake
def _(one, other):
    return torch.bmm(one, other)


def _gradients(ctx, gradient):
    one, other = ctx.saved_tensors
    of_one = float32_product(gradient, other.mT) if ctx.needs_input_grad[0] else None
    return of_one, float32_product(one.mT, gradient) if ctx.needs_input_grad[1] else None


float32_product.register_autograd(_gradients, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
