"""Matrices that depend on nothing but the sizes of a grid, computed once."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor, nn

from .cpu import may_run

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
    if torch.compiler.is_exporting() and not all(isinstance(size, int) for size in sizes):
        return build(*sizes).to(like)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
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


def multiply(matrix: Tensor, batch: Tensor) -> Tensor:
    """(n, m) matrix times each (m, k) of a batch."""
    if batch.dtype == torch.bfloat16 and matrix.numel() > batch[0].numel() and may_run(batch):
        # A CPU would copy the matrix for each of the batch. Its own part is smaller: all become columns of one product.
        product = matrix @ batch.transpose(0, 1).flatten(1)
        return product.unflatten(1, (batch.shape[0], -1)).transpose(0, 1).contiguous()
    return torch.bmm(matrix.expand(batch.shape[0], -1, -1), batch)
