#!/usr/bin/env python
"""Export a checkpoint's weights alone: as a .safetensors file, or as a .pth file in the authors' layout.

A .safetensors file holds nothing but tensors and, as JSON, what prediction needs to know (arch, number and
names of the classes, normalisation); `infer.py --model-path` takes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import checkpointing
from cli import Parser
from models.checkpoints import to_original, to_ours, unwrap
from utils import UserError, run_cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of ours or of the authors")
    parser.add_argument("output", type=Path, help="the file to write: NAME.safetensors or NAME.pth")
    parser.add_argument("--original", action="store_true", help="with the names of the authors' code")
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="the averaged weights, or not (default: if there are any)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)

    if args.output.suffix not in (".safetensors", ".pth"):
        raise UserError(f"{args.output}: name it .safetensors or .pth")
    if args.output.exists() and not args.overwrite:
        raise UserError(f"{args.output}: it is there already; --overwrite replaces it")
    state = checkpointing.load(args.checkpoint)
    tensors = unwrap(checkpointing.weights(state, args.ema, args.checkpoint))
    if args.original:
        arch = state.get("arch", "svt")
        if not arch.startswith(("spectformer", "svt")):
            raise UserError(f"{args.checkpoint}: it holds a {arch}, which the authors' code has not")
        tensors = to_original(to_ours(tensors))
    if args.output.suffix == ".safetensors":
        checkpointing.save_tensors(args.output, tensors, state)
    else:
        checkpointing.save(args.output, {"model": tensors})
    print(f"{args.output}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} numbers")


if __name__ == "__main__":
    run_cli(main)
