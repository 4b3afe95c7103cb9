"""Save a few validation images of a data set as PNG files.

Each class has its own folder. Example:

    python -m tools.save_images --data-set DIGITS --count 5 --output images
    python infer.py --model-path CKPT --image images
"""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from inputs.catalogue import build_dataset
from runtime.cli import run_cli
from training.arguments import POSITIVE, Parser
from utils import make_directory


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.save_images")
    add = parser.add_argument
    add("--data-set", default="DIGITS", metavar="NAME", help="name of the data set, as in training")
    add("--data-path", metavar="DIR", help="folder of the data set (DIGITS needs none)")
    add("--count", type=POSITIVE, default=5, metavar="N", help="number of images, spread evenly over the data set")
    add("--output", type=Path, required=True, metavar="DIR", help="output folder")
    args = parser.parse_args(argv)

    dataset = build_dataset(args.data_set, args.data_path, "val")
    for index in np.linspace(0, len(dataset) - 1, min(args.count, len(dataset))).astype(int).tolist():
        image, label = dataset.load(index)
        folder = args.output / (re.sub(r"[^\w -]", "_", dataset.class_names[label]) or "_")
        make_directory(folder)
        image.save(folder / f"{index:05d}.png")


if __name__ == "__main__":
    run_cli(main)
