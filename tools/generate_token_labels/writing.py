"""Label maps for the images that have none yet."""

import argparse
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from inputs.images import ImageDataset
from inputs.loader import KeyedImages
from inputs.sampler import SampleKey
from runtime.processes import Distributed
from training.precision import choose_precision
from utils import UserError, atomic_write, make_directory, one_line

from .checking import problems
from .places import label_maps
from .teacher import load_teacher

ORIGIN = "teacher.json"  # beside the maps: who made them
WRITERS = 16  # threads; most of a small file's time goes into waiting for the disk


def generate(args: argparse.Namespace, dataset: ImageDataset, paths: Sequence[Path], dist: Distributed) -> None:
    """Write the maps that are not there yet, this process's share of them."""
    teacher = load_teacher(args, dataset.class_names)
    precision = choose_precision(args, dist.device)
    model = teacher.model.to(dist.device)
    if dist.is_main:
        claim(args.output_dir, teacher.origin)
    dist.barrier()

    share = range(dist.rank, len(paths), dist.world_size)
    found = problems([paths[i] for i in share], len(dataset.class_names), args.num_workers, dist.is_main)
    wanted = [index for index, problem in zip(share, found, strict=True) if problem is not None]
    for folder in {paths[index].parent for index in wanted}:
        make_directory(folder)
    samples = KeyedImages(dataset, teacher.transform, seed=0)
    loader = DataLoader(
        samples,
        args.batch_size,
        sampler=[SampleKey(0, index, 0) for index in wanted],
        collate_fn=samples.join,
        num_workers=args.num_workers,
        pin_memory=dist.device.type == "cuda",
    )
    with (
        ThreadPoolExecutor(WRITERS) as pool,
        tqdm(
            desc="writing maps",
            total=len(share),
            initial=len(share) - len(wanted),
            unit=" maps",
            disable=not dist.is_main,
        ) as bar,
    ):
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            maps = label_maps(model, batch.images.to(dist.device, non_blocking=True), precision)
            for _ in pool.map(write_map, [paths[index] for index in batch.indices.tolist()], maps):
                bar.update()
    if dist.is_main:
        print(f"{len(paths)} label maps in {args.output_dir}")


def claim(folder: Path, origin: dict[str, object]) -> None:
    """Put the teacher's identity beside its maps; UserError where they are another teacher's."""
    make_directory(folder)
    path = folder / ORIGIN
    if not path.exists():
        atomic_write(path, json.dumps(origin, indent=1) + "\n")
        return
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: it should say whose maps these are: {one_line(error)}") from error
    if before != origin:
        raise UserError(f"--output-dir {folder}: its maps are another teacher's, see {path}; name another")


def write_map(path: Path, label_map: Tensor) -> None:
    buffer = io.BytesIO()
    torch.save(label_map, buffer)
    atomic_write(path, buffer.getvalue())
