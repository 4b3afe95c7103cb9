"""Copy a data set and shrink its images, so that training reads and decodes them faster.

    python -m tools.shrink_dataset IMAGENET IMAGENET-256 --short-side 256

File names and folders stay the same. Images whose shorter side is longer than --short-side are resized and saved in
the same format. All other files, including unreadable images, are copied unchanged. A second call resumes the first,
and keeps the files that exist.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from inputs.folders import walk_files
from inputs.images import is_image_name
from runtime.cli import run_cli
from training.arguments import COUNT, POSITIVE, Parser, number
from utils import UserError, make_directory, tell

PLAIN_MODES = ("L", "RGB", "RGBA", "I;16")


def copy_file(args: argparse.Namespace, name: str) -> str | None:
    """Copy a file; returns an error message if it is an image that could not be shrunk."""
    source, target, problem = args.source / name, args.target / name, None
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.tmp")
    try:
        shrunk = is_image_name(source.name) and shrink(source, unfinished, args.short_side, args.quality)
    except Exception as error:  # Pillow's plugins may raise anything
        shrunk, problem = False, f"{source}: copied unchanged: {error}"
    if not shrunk:
        shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)
    return problem


def shrink(source: Path, target: Path, short_side: int, quality: int) -> bool:
    """Save a smaller image; returns False if it is small enough or its format cannot be written."""
    with Image.open(source) as image:
        ratio = short_side / min(image.size)
        if ratio >= 1 or image.format not in Image.SAVE or getattr(image, "is_animated", False):
            return False
        kept = {name: image.info[name] for name in ("exif", "icc_profile") if name in image.info}
        size = [max(short_side, round(side * ratio)) for side in image.size]
        smaller = image
        if image.mode not in PLAIN_MODES:
            smaller = image.convert("RGBA" if "A" in image.mode or "transparency" in image.info else "RGB")
        smaller.resize(size, Image.Resampling.BICUBIC).save(target, image.format, quality=quality, **kept)
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.shrink_dataset")
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="folder of the data set")
    add("target", type=Path, metavar="DST", help="folder of the copy")
    add("--short-side", type=POSITIVE, default=256, metavar="PIXELS", help="maximum length of the shorter side")
    add("--quality", type=number(int, 1, 100), default=90, metavar="Q", help="quality of JPEG and WebP")
    add("--num-workers", type=COUNT, default=os.cpu_count(), metavar="N", help="worker processes")
    args = parser.parse_args(argv)

    if not args.source.is_dir():
        raise UserError(f"{args.source}: no such folder")
    if args.target.resolve().is_relative_to(args.source.resolve()):
        raise UserError(f"{args.target}: the copy cannot be inside {args.source}")
    make_directory(args.target)
    names = [os.path.relpath(path, args.source) for path in walk_files(args.source)]
    missing = [name for name in names if not (args.target / name).exists()]
    copies = DataLoader(missing, batch_size=None, num_workers=args.num_workers, collate_fn=partial(copy_file, args))
    done = len(names) - len(missing)
    for problem in tqdm(copies, "shrinking", total=len(names), initial=done, unit=" files", disable=None):
        if problem is not None:
            tqdm.write(problem, file=sys.stderr)
    tell(f"{len(names)} files are in {args.target}, {len(missing)} of them new")


if __name__ == "__main__":
    run_cli(main)
