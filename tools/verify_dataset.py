"""Find every image of a data set that cannot be read, ahead of the training that would stop at it.

    python -m tools.verify_dataset --data-set IMNET --data-path DIR
    python -m tools.verify_dataset --folder /any/folder --json unreadable.json

Each image is decoded whole, as training does. Prints a line for each that cannot be, `FILE: reason`.
Exit codes: 0 all can be read, 1 some cannot, 2 a mistake in the flags or in the data set's layout.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from inputs.catalogue import build_dataset
from inputs.image_sets import ImageDataset, ImageFiles
from inputs.images import BadImage
from runtime.entry_point import run_cli
from tools.command_line import ToolParser
from tools.machine import cores
from training.arguments import WORKERS
from utils import UserError, atomic_write

CHUNK = 32  # images that a process takes at a time

_dataset: ImageDataset  # of a worker process


def _start(dataset: ImageDataset) -> None:
    global _dataset
    _dataset = dataset
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one


def _problem_in_worker(index: int) -> str | None:
    return problem(_dataset, index)


def problem(dataset: ImageDataset, index: int) -> str | None:
    """Why an image cannot be read, beginning with its name; None if it can."""
    try:
        dataset.load(index)
    except BadImage as error:
        return str(error)
    return None


def problems(dataset: ImageDataset, workers: int) -> Iterator[str | None]:
    """`problem` of each image in order, found by `workers` processes (0: this one)."""
    if workers == 0:
        yield from (problem(dataset, index) for index in range(len(dataset)))
        return
    with ProcessPoolExecutor(workers, initializer=_start, initargs=(dataset,)) as pool:
        try:
            yield from pool.map(_problem_in_worker, range(len(dataset)), chunksize=CHUNK)
        except BrokenProcessPool as error:
            raise UserError(
                "a process died while it read an image, perhaps for want of memory; with "
                "--num-workers 0 the last file shown is the one"
            ) from error


def folder_images(folder: Path) -> ImageFiles:
    """All image files in a folder and below it."""
    if not folder.is_dir():
        raise UserError(f"--folder {folder}: no such folder")
    paths = sorted(str(path) for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    if not paths:
        raise UserError(f"--folder {folder}: no files in it that end in {' '.join(IMG_EXTENSIONS)}")
    return ImageFiles(paths, [0] * len(paths), [folder.name])


def chosen_parts(args: argparse.Namespace) -> dict[str, ImageDataset]:
    """The data sets to look through, by what the progress bar calls them."""
    if args.folder is not None:
        return {args.folder.name: folder_images(args.folder)}
    splits = ("train", "val") if args.split == "all" else (args.split,)
    return {split: build_dataset(args.data_set, args.data_path, split == "train") for split in splits}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("verify_dataset", __doc__)
    add = parser.add_argument
    add("--data-set", default="FOLDER", metavar="NAME", help="as in training (default: %(default)s)")
    add("--data-path", metavar="DIR", help="where it lies, as in training")
    add("--split", default="all", choices=["all", "train", "val"], help="(default: %(default)s)")
    add("--folder", type=Path, metavar="DIR", help="all images below it, in place of a data set")
    add(
        "--num-workers",
        type=WORKERS,
        default=cores(),
        metavar="N",
        help="processes; 0: this one alone (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="also write the result to FILE")
    args = parser.parse_args(argv)

    checked, unreadable = 0, []
    for name, dataset in chosen_parts(args).items():
        found = problems(dataset, args.num_workers)
        for index, reason in enumerate(tqdm(found, name, len(dataset), unit=" images", disable=None)):
            checked += 1
            if reason is not None:
                tqdm.write(reason, file=sys.stdout)
                unreadable.append({"path": dataset.path(index), "reason": reason})
    if args.json is not None:
        atomic_write(args.json, json.dumps({"checked": checked, "unreadable": unreadable}, indent=2) + "\n")
    tqdm.write(f"{checked} images, {len(unreadable)} of them unreadable", file=sys.stderr)
    if unreadable:
        sys.exit(1)


if __name__ == "__main__":
    run_cli(main)
