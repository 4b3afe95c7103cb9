"""Write a few validation images of a data set as PNG files, each in a folder of its class.

python -m tools.save_images --data-set DIGITS --count 5 --output images
python infer.py --model-path CKPT --image images
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from inputs.catalogue import build_dataset
from runtime.cli import run_cli
from tools.command_line import ToolParser
from training.arguments import POSITIVE
from utils import UserError, atomic_write, make_directory


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("save_images", __doc__)
    add = parser.add_argument
    add("--data-set", default="DIGITS", metavar="NAME", help="as in training (default: %(default)s)")
    add("--data-path", metavar="DIR", help="where its files are (DIGITS needs none)")
    add("--count", type=POSITIVE, default=5, metavar="N", help="how many, spread evenly over the data set")
    add("--output", type=Path, required=True, metavar="DIR", help="the folder to write to")
    args = parser.parse_args(argv)

    dataset = build_dataset(args.data_set, args.data_path, "val")
    if args.count > len(dataset):
        raise UserError(f"--count {args.count}: {args.data_set} has {len(dataset)} validation images")
    for index in range(0, len(dataset) // args.count * args.count, len(dataset) // args.count):
        image, label = dataset.load(index)
        folder = args.output / folder_name(dataset.class_names[label])
        make_directory(folder)
        buffer = io.BytesIO()
        image.save(buffer, format="png")
        atomic_write(folder / f"{index:05d}.png", buffer.getvalue())


def folder_name(class_name: str) -> str:
    """A class's name as that of a folder in the folder, whatever characters it has."""
    return re.sub(r"[/\\\0]|^\.*$", "_", class_name)


if __name__ == "__main__":
    run_cli(main)
