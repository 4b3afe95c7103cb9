"""Find all unreadable images of a data set before training stops at one.

    python -m tools.verify_dataset --data-set IMNET --data-path DIR
    python -m tools.verify_dataset --data-path DIR --json unreadable.json

Every image is decoded completely, as in training. Prints a line `FILE: reason` for each unreadable image.
Exit codes: 0 all images are readable, 1 some are not, 2 invalid flags or data set layout.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from inputs.catalogue import build_dataset
from inputs.images import BadImage, ImageDataset
from runtime.cli import run_cli
from training.arguments import WORKERS, Parser
from training.options import default_workers
from utils import atomic_write


def problem(dataset: ImageDataset, index: int) -> str | None:
    """Return the name of an unreadable image and the reason, or None for a readable one."""
    try:
        dataset.load(index)
    except BadImage as error:
        return str(error)
    return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.verify_dataset")
    add = parser.add_argument
    add("--data-set", default="FOLDER", metavar="NAME", help="name of the data set, as in training")
    add("--data-path", metavar="DIR", help="folder of the data set, as in training")
    add("--split", default="all", choices=["all", "train", "val", "test"], help="split to check; all: train and val")
    add("--num-workers", type=WORKERS, default=default_workers(), metavar="N", help="worker processes")
    add("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    args = parser.parse_args(argv)

    splits = ("train", "val") if args.split == "all" else (args.split,)
    parts = {split: build_dataset(args.data_set, args.data_path, split) for split in splits}
    unreadable = []
    for name, dataset in parts.items():
        images, check = range(len(dataset)), partial(problem, dataset)
        start = "fork" if args.num_workers > 0 else None  # a data set cannot be pickled
        found = DataLoader(images, None, num_workers=args.num_workers, collate_fn=check, multiprocessing_context=start)
        for index, reason in enumerate(tqdm(found, name, unit=" images", disable=None)):
            if reason is not None:
                tqdm.write(reason, file=sys.stdout)
                unreadable.append({"path": dataset.path(index), "reason": reason})
    checked = sum(map(len, parts.values()))
    if args.json is not None:
        atomic_write(args.json, json.dumps({"checked": checked, "unreadable": unreadable}, indent=2) + "\n")
    tqdm.write(f"{checked} images, {len(unreadable)} of them unreadable", file=sys.stderr)
    if unreadable:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
