"""What all tools share: their command line, and the machine and versions that a measurement names."""

import argparse
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from training.arguments import HelpFormatter, Parser, dashed


class ToolHelp(HelpFormatter):
    """Help that begins with paragraphs; those that are indented, such as commands and tables, are left as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(part if part.startswith(" ") else fill(part, width, indent) for part in paragraphs)


class ToolParser(Parser):
    """The parser of `python -m tools.NAME`: its help is the tool's docstring, flags are spelt with - or _."""

    def __init__(self, name: str, description: str):
        super().__init__(description, prog=f"python -m tools.{name}")
        self.formatter_class = ToolHelp

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        """`args`, or the process's own; raises UserError for mistakes in them."""
        return super().parse_args([dashed(word) for word in (sys.argv[1:] if args is None else args)], namespace)


def processor() -> str:
    """The processor's name where Linux gives it, otherwise its kind."""
    info = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", info.read_text() if info.exists() else "")
    return name[1] if name else platform.machine()


def describe_machine() -> dict[str, Any]:
    """Machine and versions."""
    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
