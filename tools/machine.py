"""Describe the machine and the versions of a measurement."""

import platform
import re
from pathlib import Path
from typing import Any

import timm
import torch


def processor() -> str:
    """Return the name of the processor on Linux, otherwise its architecture."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return name[1] if name else platform.machine()


def describe_machine() -> dict[str, Any]:
    """Return the hardware, threads, system and versions."""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
