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
from torch.utils.flop_counter import flop_registry

import models
from runtime.cli import run_cli
from training.arguments import POSITIVE, Parser

BANDWIDTH, PRODUCTS, LAUNCH = 3.35e12, 400e12, 4e-6  # bytes/s, bf16 operations/s, seconds per kernel
FFT_KERNELS, FFT_PASSES = 4, 6  # copy to contiguous, a transform for each axis, scaling

aten = torch.ops.aten
# Functions that count the multiplications and additions of products, convolutions and attention. PyTorch's own lack the
# CPU's attention, and count the backward pass of a depthwise convolution as that of a dense one.
FORMULAS = flop_registry | {
    aten.convolution_backward: lambda gradient, _, weight, *__, **___: 4 * gradient.numel() * weight[0].numel(),
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Traffic(TorchDispatchMode):
    """Counts the bytes and kernels by operation, and the seconds in total."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        read, written = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), results))
        if "empty" in name or name == "_unsafe_view" or func.is_view or not written:  # runs no kernel
            return results
        moved, kernels = sum(map(stored_bytes, read + written)), 1
        if name.startswith("_fft"):
            moved, kernels = FFT_PASSES * max(map(stored_bytes, read + written)), FFT_KERNELS
        self.bytes[name] += moved
        self.kernels[name] += kernels
        formula = FORMULAS.get(func.overloadpacket)
        operations = formula(*args, **(kwargs or {}), out_val=results) if formula else 0
        self.seconds += max(moved / BANDWIDTH, operations / PRODUCTS, kernels * LAUNCH)
        return results


def stored_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory; an expanded axis is stored once."""
    entries = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return entries * tensor.element_size()


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
    args = parser.parse_args(argv)
    print(f"{'model':36}{'GB':>8}{'kernels':>9}{'ms':>8}   a training step of {args.batch_size} images")
    for name in args.models:
        traffic = training_step(name, args.batch_size, args.img_size)
        gigabytes, kernels = traffic.bytes.total() / 1e9, traffic.kernels.total()
        print(f"{name:36}{gigabytes:8.1f}{kernels:9}{traffic.seconds * 1e3:8.1f}", flush=True)


if __name__ == "__main__":
    run_cli(main)
