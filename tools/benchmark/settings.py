"""How a contender is run."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """How a model is run. Half precision is autocast over float32 weights, as in training."""

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False
    batch_size: int = 16
    img_size: int = 224

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.dtype != "float32")
