#!/usr/bin/env python
"""Write a few validation images of a data set as PNG files, e.g. to try `infer.py --image` on them."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import build_dataset
from utils import UserError, atomic_write, run_cli


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-set", default="DIGITS", help="a name that training takes")
    parser.add_argument("--data-path", default=None, help="where its files are (DIGITS needs none)")
    parser.add_argument("--count", type=int, default=5, help="how many, spread evenly over the data set")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write to")
    args = parser.parse_args(argv)

    dataset = build_dataset(args.data_set, args.data_path, train=False)
    if not 1 <= args.count <= len(dataset):
        raise UserError(f"--count {args.count}: {args.data_set} has {len(dataset)} validation images")
    args.output.mkdir(parents=True, exist_ok=True)
    for index in range(0, len(dataset) // args.count * args.count, len(dataset) // args.count):
        image, label = dataset.load(index)
        buffer = io.BytesIO()
        image.save(buffer, format="png")
        atomic_write(args.output / f"{index:05d}_{dataset.class_names[label]}.png", buffer.getvalue())


if __name__ == "__main__":
    run_cli(main)
