#!/usr/bin/env python
"""Write the label maps that token labelling trains on: a teacher's top-5 classes at each place of each image.

    tools/generate_token_labels.py --data-path /path/to/imagenet --output-dir MAPS --model-path TEACHER.pth
    tools/generate_token_labels.py --data-path /path/to/imagenet --output-dir MAPS --pretrained \\
        --arch dm_nfnet_f6.dm_in1k --input-size 576
    tools/generate_token_labels.py --data-path /path/to/imagenet --output-dir MAPS --check

The teacher is any classifier that timm has, or one trained here, of the data set's own classes. It sees each
whole image, squashed to a square, and its classifier is applied to every place of its last feature map. The
logits are interpolated to 18 x 18.

A map is `<output-dir>/<class folder>/<image stem>.pt`, a tensor (2, 5, 18, 18): logits, largest first, then
class indices. So are the published maps (label_top5_train_nfnet, from NFNet-F6 at 576 pixels, whose feature
map is 18 x 18), which are half floats, e.g. `label_top5_train_nfnet/n01440764/n01440764_18.pt`. With more
than 2,048 classes, whose indices half floats do not hold, the same tensor is float32.

A second call goes on where the first one stopped: maps that are whole stay. Under torchrun every process
takes its share of the images. `--check` names every map that is missing, damaged, for other classes, or of
no image.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from cli import COUNT, POSITIVE, Parser, class_list, dashed, image_size
from datasets import ImageDataset, build_dataset
from engine import Precision, choose_precision
from infer import build_from_checkpoint
from token_labels import MAP_SIZE, encode_label_map, image_map_path, read_label_map
from utils import Distributed, UserError, atomic_write, init_distributed, make_directory, one_line, run_cli

ORIGIN = "teacher.json"  # beside the maps: who made them
NAMED = 20  # bad maps that --check lists of each kind
WRITERS = 16  # threads; most of a small file's time goes into waiting for the disk


# ---------------------------------------------------------------------------------------------------- teacher


@dataclass(frozen=True)
class Teacher:
    """A classifier and the images it expects. `origin` identifies it."""

    model: nn.Module
    transform: Callable
    origin: dict[str, object]


def load_teacher(args: argparse.Namespace, class_names: Sequence[str]) -> Teacher:
    """The teacher of the command line, in evaluation mode.

    Raises:
        UserError: there is no such teacher, or it has not the data set's classes.
    """
    if args.pretrained:
        model, config, origin = _published(args, len(class_names))
    else:
        model, info = build_from_checkpoint(args.model_path, args.arch, input_size=args.input_size)
        if info.num_classes != len(class_names) or info.class_names not in (None, tuple(class_names)):
            raise UserError(
                f"--model-path {args.model_path}: its {info.num_classes} classes are not the "
                f"{len(class_names)} of --data-set {args.data_set}"
            )
        with open(args.model_path, "rb") as file:
            origin = {"arch": info.arch, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        config = {
            "input_size": info.input_size,
            "mean": info.mean,
            "std": info.std,
            "interpolation": info.interpolation,
        }
    transform = create_transform(**config, crop_pct=1.0, crop_mode="squash")
    origin |= {"input_size": list(config["input_size"]), "classes": len(class_names)}
    return Teacher(model.eval(), transform, origin)


def _published(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict, dict]:
    """(model, its transform's arguments, its identity) with the weights that timm publishes."""
    cfg = get_pretrained_cfg(args.arch) if timm.is_model(args.arch.split(".")[0]) else None
    if cfg is None or not cfg.has_weights:
        raise UserError(f"--arch {args.arch}: timm publishes no weights of such a model")
    if cfg.num_classes != num_classes:
        raise UserError(
            f"--arch {args.arch}: its published weights are for {cfg.num_classes} classes, "
            f"--data-set {args.data_set} has {num_classes}"
        )
    size = {"img_size": args.input_size} if args.input_size and cfg.fixed_input_size else {}
    try:
        model = timm.create_model(args.arch, pretrained=True, **size)
    except (OSError, RuntimeError, ValueError) as error:  # not fetched, or not for this size
        raise UserError(f"--arch {args.arch} --pretrained: {one_line(error)}") from error
    config = resolve_data_config(model=model)
    config = {key: config[key] for key in ("mean", "std", "interpolation")} | {
        "input_size": args.input_size or tuple(config["input_size"][1:])
    }
    return model, config, {"arch": args.arch, "weights": cfg.hf_hub_id or cfg.url}


def position_logits(model: nn.Module, images: Tensor) -> Tensor:
    """What a classifier says at each place of its last feature map.

    Each place's feature in turn takes the place of the whole feature map and goes through the model's head,
    which pools and normalises as it would; where the model has a classifier of tokens (`aux_head`), through
    that.

    Args:
        images: (B, 3, H, W).

    Returns:
        (B, classes, h, w).

    Raises:
        UserError: the model has no feature map, or a head that needs all of it.
    """
    name = type(model).__name__
    try:
        features = model.forward_features(images)
        places, grid = _places(model, features)
        if getattr(model, "token_label", False):
            logits = model.aux_head(places)
        else:
            logits = model.forward_head(_alone(model, places, features.ndim)).unflatten(0, places.shape[:2])
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"--arch: {name} cannot classify place by place: {one_line(error)[:200]}") from error
    if logits.ndim != 3 or logits.shape[2] != model.num_classes:
        raise UserError(f"--arch: the head of {name} gives {tuple(logits.shape)} place by place")
    return logits.mT.unflatten(2, grid)


def _places(model: nn.Module, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Features of the places, (B, h·w, C), and (h, w)."""
    if features.ndim == 4 and _channels_last(model):
        return features.flatten(1, 2), tuple(features.shape[1:3])
    if features.ndim == 4:
        return features.flatten(2).mT, tuple(features.shape[2:])
    places = features[:, model.num_prefix_tokens :] if hasattr(model, "num_prefix_tokens") else features
    grid = _token_grid(model, places.shape[1])
    return places, grid


def _channels_last(model: nn.Module) -> bool:
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def _token_grid(model: nn.Module, tokens: int) -> tuple[int, int]:
    """The grid of a token sequence; timm's patch embedding says it, else it is square."""
    grid = tuple(getattr(getattr(model, "patch_embed", None), "grid_size", None) or ())
    side = math.isqrt(tokens)
    for candidate in (grid, getattr(model, "token_label_size", ()), (side, side)):
        if len(candidate) == 2 and math.prod(candidate) == tokens:
            return tuple(candidate)
    raise ValueError(f"{tokens} tokens are no grid")


def _alone(model: nn.Module, places: Tensor, ndim: int) -> Tensor:
    """Every place as the features of an image of its own, (B·h·w, …): one token, or one pixel.

    A class token would be pooled in the places' stead, so it is the place itself.
    """
    features = places.flatten(0, 1)
    if ndim == 4:
        return features[:, None, None] if _channels_last(model) else features[:, :, None, None]
    return features[:, None].expand(-1, 1 + getattr(model, "num_prefix_tokens", 0), -1)


@torch.inference_mode()
def label_maps(model: nn.Module, images: Tensor, precision: Precision) -> list[Tensor]:
    """The label maps, (2, 5, 18, 18) each, of images (B, 3, H, W)."""
    with precision.autocast():
        logits = position_logits(model, images)
    logits = F.interpolate(logits.float(), (MAP_SIZE, MAP_SIZE), mode="bilinear", antialias=True)
    if not logits.isfinite().all():
        raise UserError("the teacher's logits are not finite; try --amp none, or check --model-path")
    return [encode_label_map(of_image).cpu() for of_image in logits]


# ---------------------------------------------------------------------------------------------------- reading


class MapFiles(Dataset):
    """What is wrong with each label map, None where nothing is."""

    def __init__(self, paths: Sequence[Path], num_classes: int):
        self.paths = paths
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str | None:
        try:
            read_label_map(self.paths[index], self.num_classes)
        except UserError as error:
            return str(error)
        return None


def problems(paths: Sequence[Path], num_classes: int, workers: int, show: bool) -> Iterator[str | None]:
    """What is wrong with each map, in order."""
    loader = DataLoader(MapFiles(paths, num_classes), batch_size=64, num_workers=workers, collate_fn=list)
    with tqdm(desc="reading maps", total=len(paths), unit=" maps", disable=not show) as bar:
        for found in loader:
            bar.update(len(found))
            yield from found


class TeacherImages(Dataset):
    """(image as the teacher expects it, index), or the error that reading it met."""

    def __init__(self, dataset: ImageDataset, indices: Sequence[int], transform: Callable):
        self.dataset = dataset
        self.indices = indices
        self.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[Tensor, int] | UserError:
        index = self.indices[position]
        try:
            return self.transform(self.dataset.load(index)[0]), index
        except UserError as error:
            return error


def collate(samples: Sequence[tuple[Tensor, int] | UserError]) -> list[Tensor] | UserError:
    """A batch, or the first error in it: raised in a worker it would reach the user as a traceback."""
    failed = next((sample for sample in samples if isinstance(sample, UserError)), None)
    return default_collate(samples) if failed is None else failed


# ---------------------------------------------------------------------------------------------------- writing


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
    images = TeacherImages(dataset, wanted, teacher.transform)
    loader = DataLoader(
        images, args.batch_size, collate_fn=collate, num_workers=args.num_workers, pin_memory=dist.device.type == "cuda"
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
            images, indices = batch
            maps = label_maps(model, images.to(dist.device, non_blocking=True), precision)
            for _ in pool.map(write_map, [paths[index] for index in indices.tolist()], maps):
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


# --------------------------------------------------------------------------------------------------- checking


def check(args: argparse.Namespace, paths: Sequence[Path], num_classes: int) -> None:
    """Name what is wrong with the maps; raises UserError if anything is."""
    if not args.output_dir.is_dir():
        raise UserError(f"--output-dir {args.output_dir}: no such folder")
    bad = Counter()
    for path, problem in zip(paths, problems(paths, num_classes, args.num_workers, show=True), strict=True):
        if problem is not None:
            complain(bad, "damaged or mismatched" if path.exists() else "missing", problem)
    expected = set(map(str, paths))
    for file in sorted(args.output_dir.rglob("*.pt")):
        if str(file) not in expected:
            complain(bad, "of no image", f"{file}: there is no image for this label map")
    if bad:
        summary = ", ".join(f"{count} {kind}" for kind, count in bad.items())
        raise UserError(f"--output-dir {args.output_dir}: of {len(paths)} label maps {summary}")
    print(f"{len(paths)} label maps in {args.output_dir}, all whole and for these {num_classes} classes")


def complain(bad: Counter, kind: str, problem: str) -> None:
    bad[kind] += 1
    if bad[kind] <= NAMED:
        tqdm.write(problem)


# ----------------------------------------------------------------------------------------------- command line


def map_paths(dataset: ImageDataset, folder: Path) -> list[Path]:
    """Each image's map; raises UserError where two images would share one."""
    images: dict[Path, int] = {}
    for index in range(len(dataset)):
        path = image_map_path(folder, dataset.path(index))
        if path in images:
            raise UserError(
                f"{dataset.path(images[path])} and {dataset.path(index)} would share the label "
                f"map {path}; rename one of them"
            )
        images[path] = index
    return list(images)


def build_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument_group("data").add_argument
    add("--data-path", metavar="DIR", help="where the data set lies, as in training")
    add("--data-set", default="FOLDER", metavar="NAME", help="as in training (default: %(default)s)")
    add("--classes", type=class_list, metavar="A,B,...", help="only these classes, as in training")
    add("--inat-category", default="name", metavar="RANK", help="what INAT19 classifies, as in training")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="of the label maps, --token-label-data later")
    add("--check", action="store_true", help="write nothing; name missing, damaged, mismatched, stray maps")
    add = parser.add_argument_group("teacher").add_argument
    add("--model-path", type=Path, metavar="CKPT", help="a checkpoint of ours, of the authors' or of timm")
    add("--arch", metavar="NAME", help="timm's name, where the checkpoint does not say it")
    add("--pretrained", action="store_true", help="take the weights that timm publishes")
    add("--input-size", type=image_size, metavar="PIXELS", help="(default: the teacher's own)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=POSITIVE, default=64, metavar="N", help="images a step (default: %(default)s)")
    add(
        "--num-workers",
        type=COUNT,
        default=min(10, len(os.sched_getaffinity(0))),
        metavar="N",
        help="processes that read; 0: read in this one (default: %(default)s)",
    )
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="none", choices=["auto", "bf16", "fp16", "none"], help="(default: %(default)s)")
    parser.set_defaults(dtype="float32")
    return parser


def validate(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other."""
    if args.check:
        return
    if bool(args.model_path) == args.pretrained:
        raise UserError("the teacher is either --model-path CKPT or --arch NAME --pretrained")
    if args.pretrained and args.arch is None:
        raise UserError("--pretrained needs --arch NAME")


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args([dashed(word) for word in (sys.argv[1:] if argv is None else argv)])
    validate(args)
    dist = init_distributed(args.device)
    dataset = build_dataset(
        args.data_set, args.data_path, train=True, inat_category=args.inat_category, classes=args.classes
    )
    paths = map_paths(dataset, args.output_dir)
    if args.check:
        check(args, paths, len(dataset.class_names))
    else:
        generate(args, dataset, paths, dist)


if __name__ == "__main__":
    run_cli(main)
