"""The precision of a model, and device settings for speed."""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Precision:
    """The dtype of weights and images, and the dtype of autocast (None: off)."""

    device: torch.device
    dtype: torch.dtype
    amp: torch.dtype | None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


def choose_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    """The precision of --dtype and --amp; `auto` is mixed precision on CUDA, in bf16 if natively supported."""
    dtype = getattr(torch, args.dtype)
    amp = args.amp
    if amp == "auto":
        on_gpu = device.type == "cuda" and dtype is torch.float32
        native = on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        amp = ("bf16" if native else "fp16") if on_gpu else "none"
    return Precision(device, dtype, {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp])


def as_input(images: Tensor, precision: Precision, channels_last: bool = False) -> Tensor:
    """Images (B, C, H, W) in the model's dtype and memory format."""
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return images.to(dtype=precision.dtype, memory_format=memory_format)


def set_up_device(device: torch.device, fixed_sizes: bool = True) -> None:
    """Allow TF32 in float32 products and convolutions on a GPU; for images of one size, let cuDNN search algorithms."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = fixed_sizes
