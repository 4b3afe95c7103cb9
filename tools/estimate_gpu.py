"""Estimate the training step of models on a GPU without having one, by counting operations on fake tensors.

    python -m tools.estimate_gpu spectformer_h_s svt_h_s pvt_v2_b2 swin_tiny_patch4_window7_224

The estimate is for eager mode and bf16 autocast on an H100. The time of an operation is the largest of three: its
memory traffic divided by the bandwidth, its arithmetic divided by the throughput, and its kernel launches. Use the
results to compare models; they do not predict a measurement.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import models
from runtime.cli import run_cli
from training.arguments import POSITIVE, Parser
from utils import UserError

BANDWIDTH, PRODUCTS, LAUNCH = 3.35e12, 400e12, 4e-6  # bytes/s, bf16 operations/s, seconds per kernel
FFT_KERNELS, FFT_PASSES = 4, 6  # copy to contiguous, a transform for each axis, scaling


class Traffic(TorchDispatchMode):
    """Counts the bytes and kernels by operation, and the seconds in total."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace not in ("aten", "prim", "prims"):
            raise UserError(f"{func}: the memory traffic of custom operations is unknown")
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), results))
        if "empty" in name or name == "_unsafe_view" or func.is_view or not written:  # runs no kernel
            return results
        moved, kernels = sum(map(stored_bytes, read + written)), 1
        if name.startswith("_fft"):
            moved, kernels = FFT_PASSES * max(map(stored_bytes, read + written)), FFT_KERNELS
        self.bytes[name] += moved
        self.kernels[name] += kernels
        self.seconds += max(moved / BANDWIDTH, operations(name, read, written) / PRODUCTS, kernels * LAUNCH)
        return results


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory; an expanded axis is stored once."""
    entries = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return entries * tensor.element_size()


def operations(name: str, read: list[Tensor], written: list[Tensor]) -> float:
    """Count the multiplications and additions of matrix products, convolutions and attention; 0 for the rest."""
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        return 2 * written[0].numel() * read[-1].shape[-2]
    if name == "convolution":
        return 2 * written[0].numel() * math.prod(read[1].shape[1:])
    if name == "convolution_backward":
        return 4 * read[0].numel() * math.prod(read[2].shape[1:])
    if "attention" in name:
        # The forward pass has two matrix products, the backward pass five. The latter's first argument is the gradient.
        backward = "backward" in name
        query, key = read[backward : backward + 2]
        return 4 * query.numel() * key.shape[-2] * (2.5 if backward else 1)
    return 0


class AutocastOfCuda(TorchFunctionMode):
    """Compute layer norms in float32 under autocast, as on CUDA; the CPU's autocast uses bf16."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args = tuple(arg.float() if isinstance(arg, Tensor) else arg for arg in args)
            kwargs = {key: arg.float() if isinstance(arg, Tensor) else arg for key, arg in kwargs.items()}
        return func(*args, **kwargs)


def training_step(name: str, batch_size: int = 128, img_size: int = 224) -> Traffic:
    """Count a timm model's forward pass, cross-entropy and backward pass in bf16 autocast, without stochastic depth."""
    with torch.device("meta"):
        model = models.create_model(name, 1000, (img_size, img_size), {}).train()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    # On the CPU, because a backward pass on fake CUDA tensors needs a driver. Fake tensors run no CPU kernels.
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        model._apply(lambda tensor: torch.empty_like(fake.from_tensor(tensor), device="cpu"))
        images = torch.empty(batch_size, 3, img_size, img_size)
        labels = torch.empty(batch_size, dtype=torch.long)
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16), AutocastOfCuda():
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()
    return traffic


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.estimate_gpu")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="names of timm models")
    parser.add_argument("--batch-size", type=POSITIVE, default=128, metavar="N", help="images per step")
    parser.add_argument("--img-size", type=POSITIVE, default=224, metavar="N", help="image side in pixels")
    parser.add_argument("--operations", type=POSITIVE, metavar="N", help="also list the N operations with most traffic")
    args = parser.parse_args(argv)
    print(f"{'model':36}{'GB':>8}{'kernels':>9}{'ms':>8}   a training step of {args.batch_size} images")
    for name in args.models:
        traffic = training_step(name, args.batch_size, args.img_size)
        gigabytes, kernels = traffic.bytes.total() / 1e9, traffic.kernels.total()
        print(f"{name:36}{gigabytes:8.1f}{kernels:9}{traffic.seconds * 1e3:8.1f}", flush=True)
        for operation, moved in traffic.bytes.most_common(args.operations) if args.operations else ():
            print(f"    {operation:32}{moved / 1e9:8.2f}{traffic.kernels[operation]:9}")


if __name__ == "__main__":
    run_cli(main)
