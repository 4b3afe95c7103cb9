"""Cached matrices that depend only on the sizes of a grid."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor, nn

from .cpu.kernels import is_exporting, is_transformed, may_run

Build = Callable[..., Tensor]
_builders: dict[str, Build] = {}


def builder(build: Build) -> Build:
    """Register a function build(*sizes) for `matrix`; it must return a float64 matrix on the CPU."""
    _builders[build.__name__] = build
    return build


def matrix(build: Build, *sizes: int, like: Tensor) -> Tensor:
    """Return `build(*sizes)` in the dtype and on the device of `like`.

    A module's buffer would be broadcast by DDP on every step and rounded by a cast to half precision. For sizes that
    are dynamic in an export, the exported graph computes the matrix.
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
    # Build in a new thread, without the caller's modes: a matrix built in inference mode, on fake tensors
    # or inside a torch.func transform could not be cached for other callers.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: build(*sizes).to(device, dtype)).result()


@torch.library.custom_op(f"{__name__.partition('.')[0]}::matrix", mutates_args=())
def _in_graph(name: str, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`matrix` for compiled graphs; returns a copy, because the graph may write into it."""
    return _computed(_builders[name], tuple(sizes), dtype, device).clone()


@_in_graph.register_fake
def _(name, sizes, dtype, device):
    return _builders[name](*sizes).to(device, dtype)


def multiply(matrix: Tensor, batch: Tensor, add: Tensor | None = None) -> Tensor:
    """Multiply a matrix (n, m) by each (m, k) of a batch and add `add` (batch, n, k); float32 without TF32."""
    if batch.dtype == torch.bfloat16 and matrix.numel() > batch[0].numel() and add is None and may_run(batch):
        # bmm would copy the matrix for every sample on a CPU. A single product copies the smaller samples instead.
        product = matrix @ batch.transpose(0, 1).flatten(1)
        return product.unflatten(1, (batch.shape[0], -1)).transpose(0, 1).contiguous()
    matrix = matrix.expand(batch.shape[0], -1, -1)
    if batch.is_cuda and batch.dtype == torch.float32 and not is_transformed(batch):
        product = float32_product(matrix, batch)
        return product if add is None else product + add
    return torch.bmm(matrix, batch) if add is None else torch.baddbmm(add, matrix, batch)


@torch.library.custom_op(f"{__name__.partition('.')[0]}::float32_product", mutates_args=())
def float32_product(one: Tensor, other: Tensor) -> Tensor:
    """`torch.bmm` without TF32, also in the backward pass, regardless of the global float32 precision."""
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
