"""The command line that all tools share."""

import argparse
import sys
from collections.abc import Sequence

from training.arguments import HelpFormatter, Parser, dashed


class ToolHelp(HelpFormatter):
    """Help that begins with paragraphs, whose indented lines stay as they are: commands, tables."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.strip("\n").split("\n\n")
        fill = super()._fill_text
        return "\n\n".join(part if part.startswith(" ") else fill(part, width, indent) for part in paragraphs)


class ToolParser(Parser):
    """The parser of `python -m tools.NAME`: its help is the tool's docstring, flags come with - or _."""

    def __init__(self, name: str, description: str):
        super().__init__(description, prog=f"python -m tools.{name}")
        self.formatter_class = ToolHelp

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        """`args`, or the process's own; raises UserError for what is wrong with them."""
        return super().parse_args([dashed(word) for word in (sys.argv[1:] if args is None else args)], namespace)
