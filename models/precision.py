"""In which precision a layer computes: the input's, or that of autocast."""

import torch
from torch import Tensor


def full_dtype(x: Tensor) -> torch.dtype:
    """float32 for half-precision tensors, else their own."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's, where it is on and x is not float64, else that of x."""
    cast = autocast_enabled(x) and x.dtype != torch.float64
    return torch.get_autocast_dtype(_device_type(x)) if cast else x.dtype


def full_precision(x: Tensor) -> Tensor:
    """Half-precision tensors as float32; float32 and float64 as they are."""
    return x.to(full_dtype(x))


def to_autocast(x: Tensor) -> Tensor:
    """A tensor in its `autocast_dtype`."""
    return x.to(autocast_dtype(x))


def autocast_enabled(x: Tensor) -> bool:
    """Whether autocast is on, on the device of x."""
    return torch.is_autocast_enabled(_device_type(x))


def autocast_off(x: Tensor) -> torch.autocast:
    """A context without autocast on the device of x."""
    return torch.autocast(_device_type(x), enabled=False)


def _device_type(x: Tensor) -> str:
    return "cpu" if x.is_meta else x.device.type  # the meta device has no autocast of its own
