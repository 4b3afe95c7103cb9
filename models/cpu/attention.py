"""Self-attention, a few heads at a time.

PyTorch's fused attention computes the scores in tiles and recomputes them in the backward pass. This kernel computes
whole heads, as many as fit into cache, in two thirds of the time, and half the time in training (bfloat16, 196 tokens).
It also has second derivatives, unlike PyTorch's CPU kernel.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .kernels import empty_gradients, images_per_slice, in_slices, kernel, may_run, register_gradients

# Scores computed together: 3 MiB in half precision. PyTorch computes heads with more scores.
SLICE_ELEMENTS = 3 * 2**19


def attend(qkv: Tensor) -> Tensor | None:
    """Map (B, N, 3, heads, head_dim) to (B, N, heads, head_dim); return None if the kernel cannot run."""
    if not may_run(qkv) or qkv.shape[1] ** 2 > SLICE_ELEMENTS:
        return None
    if qkv.dtype == torch.float32 and not torch.is_grad_enabled():
        return None  # PyTorch's kernel is as fast
    heads = [part.transpose(1, 2).flatten(0, 1) for part in qkv.unbind(2)]
    return attend_in_slices(heads).unflatten(0, (len(qkv), -1)).transpose(1, 2)


@kernel("attend")
def attend_in_slices(inputs: Sequence[Tensor]) -> Tensor:
    """Compute `general_attend` for q, k and v of (heads, N, head_dim)."""
    q, k, v = inputs
    y = v.new_empty(v.shape)
    scale = q.shape[2] ** -0.5
    for q_, k_, v_, out, (shares,) in _in_slices(1, q * scale, k, v, y):
        _share(q_, k_, out=shares)
        torch.bmm(shares, v_, out=out)
    return y


@kernel("attend_backward")
def attend_backward(grad: Tensor, _: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute the gradients of `general_attend`, recomputing the attention weights."""
    q, k, v = inputs
    grads = empty_gradients(inputs)
    scale = q.shape[2] ** -0.5
    pieces = _in_slices(2, q * scale, k, v, grad.contiguous(), *grads)
    for q_, k_, v_, g, grad_q, grad_k, grad_v, (shares, grad_scores) in pieces:
        _share(q_, k_, out=shares)
        torch.bmm(shares.mT, g, out=grad_v)
        torch.bmm(g, v_.mT, out=grad_scores)  # the weights' gradient, until the next line
        torch._softmax_backward_data(grad_scores, shares, -1, shares.dtype, grad_input=grad_scores)
        torch.bmm(grad_scores, k_, out=grad_q)
        torch.bmm(grad_scores.mT, q_, out=grad_k)
    grads[0].mul_(scale)
    return grads


def general_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q k^T / sqrt(head_dim)) v for q, k, v of (..., N, head_dim)."""
    return (q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v


attend_in_slices.register_fake(lambda inputs: inputs[2].new_empty(inputs[2].shape))
register_gradients(attend_in_slices, attend_backward, general_attend)


def _share(q: Tensor, k: Tensor, out: Tensor) -> None:
    """Write the attention weights into (heads, N, N). Softmax works in place, as it reads a row before writing it."""
    torch.bmm(q, k.mT, out=out)
    torch._softmax(out, -1, False, out=out)


def _in_slices(buffers: int, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors (heads, N, head_dim) for a few heads at a time, and `buffers` tensors (heads, N, N) for them."""
    heads, tokens, _ = parts[0].shape
    size = images_per_slice(heads, tokens**2, SLICE_ELEMENTS)
    memory = parts[0].new_empty(buffers, size, tokens, tokens)
    for slices in in_slices(size, *parts):
        yield *slices, memory[:, : len(slices[0])]
