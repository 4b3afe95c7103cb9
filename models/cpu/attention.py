"""Self-attention, a few heads at a time.

PyTorch's fused attention computes the scores tile by tile, and anew in the backward pass. Those of a few heads fit into
cache whole, where as large products they take two thirds of the time, and in training half (bfloat16, 196 tokens). On a
CPU PyTorch's has no second derivative either.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .kernels import empty_gradients, images_per_slice, kernel, may_run, register_gradients

# Scores computed together: 3 MiB in half precision. A head that has more of them is left to PyTorch.
SLICE_ELEMENTS = 3 * 2**19


def attend(qkv: Tensor) -> Tensor | None:
    """(B, N, 3, heads, head_dim) to (B, N, heads, head_dim), or None where the kernel may not run."""
    if not may_run(qkv) or qkv.shape[1] ** 2 > SLICE_ELEMENTS:
        return None
    if qkv.dtype == torch.float32 and not torch.is_grad_enabled():
        return None  # PyTorch's is as fast
    q, k, v = (part.transpose(1, 2).flatten(0, 1) for part in qkv.unbind(2))
    return attend_in_slices(q, k, v).unflatten(0, (len(qkv), -1)).transpose(1, 2)


@kernel("attend")
def attend_in_slices(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v for (heads, N, head_dim) each."""
    y = v.new_empty(v.shape)
    scale = q.shape[2] ** -0.5
    for q_, k_, v_, out, (shares,) in _in_slices(1, q * scale, k, v, y):
        _share(q_, k_, out=shares)
        torch.bmm(shares, v_, out=out)
    return y


@kernel("attend_backward")
def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """Gradients of `attend_in_slices`; the shares are computed anew."""
    grads = empty_gradients(q, k, v)
    scale = q.shape[2] ** -0.5
    pieces = _in_slices(2, q * scale, k, v, grad.contiguous(), *grads)
    for q_, k_, v_, g, grad_q, grad_k, grad_v, (shares, grad_scores) in pieces:
        _share(q_, k_, out=shares)
        torch.bmm(shares.mT, g, out=grad_v)
        torch.bmm(g, v_.mT, out=grad_scores)  # the shares' gradient, until the next line
        torch._softmax_backward_data(grad_scores, shares, -1, shares.dtype, grad_input=grad_scores)
        torch.bmm(grad_scores, k_, out=grad_q)
        torch.bmm(grad_scores.mT, q_, out=grad_k)
    grads[0].mul_(scale)
    return grads


@attend_in_slices.register_fake
def _empty_result(_q, _k, v):
    return v.new_empty(v.shape)


def explicit_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(head_dim)) v for (..., N, head_dim) each."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


register_gradients(attend_in_slices, attend_backward, explicit_attention)


def _share(q: Tensor, k: Tensor, out: Tensor) -> None:
    """How much each token takes of every other one, into (heads, N, N). Softmax reads a row before it writes it."""
    torch.bmm(q, k.mT, out=out)
    torch._softmax(out, -1, False, out=out)


def _in_slices(buffers: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (heads, N, head_dim) a few heads at a time, and memory for as many (N, N) in each of the buffers."""
    heads, tokens, _ = parts[0].shape
    size = images_per_slice(heads, tokens**2, SLICE_ELEMENTS)
    memory = parts[0].new_empty(buffers, size, tokens, tokens)
    for slices in zip(*(part.split(size) for part in parts), strict=True):
        yield *slices, memory[:, : len(slices[0])]
