"""The precision of a layer: the input's or autocast's."""

import torch
from torch import Tensor


def full_dtype(x: Tensor) -> torch.dtype:
    """Return float32 for half-precision tensors, otherwise their dtype."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def autocast_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of a linear layer's computation: autocast's if it is on and x is not float64, else x's."""
    cast = autocast_enabled(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(_device_type(x)) if cast else x.dtype


def full_precision(x: Tensor) -> Tensor:
    """Cast half-precision tensors to float32; return float32 and float64 unchanged."""
    return x.to(full_dtype(x))


def to_autocast(x: Tensor) -> Tensor:
    """Cast a tensor to its `autocast_dtype`."""
    return x.to(autocast_dtype(x))


def autocast_enabled(x: Tensor) -> bool:
    """Return whether autocast is on for the device of x."""
    return torch.is_autocast_enabled(_device_type(x))


def autocast_off(x: Tensor) -> torch.autocast:
    """Return a context that turns autocast off for the device of x."""
    return torch.autocast(_device_type(x), enabled=False)


def _device_type(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # the meta device has no autocast
