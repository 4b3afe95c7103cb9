"""The command line that all tools share."""

import argparse
import sys
from collections.abc import Sequence

from training.arguments import Parser, dashed


class ToolParser(Parser):
    """The parser of `python -m tools.NAME`: its help is the tool's docstring, flags come with - or _."""

    def __init__(self, name: str, description: str):
        super().__init__(description, prog=f"python -m tools.{name}")
        self.formatter_class = argparse.RawDescriptionHelpFormatter

    def parse_args(self, args: Sequence[str] | None = None, namespace: None = None) -> argparse.Namespace:
        """`args`, or the process's own; raises UserError for what is wrong with them."""
        return super().parse_args([dashed(word) for word in (sys.argv[1:] if args is None else args)], namespace)
