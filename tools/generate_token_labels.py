r"""Write the label maps for token labelling: a teacher's top-5 classes at each position of each image.

    python -m tools.generate_token_labels --data-path IMAGENET \
        --output-dir MAPS --model-path TEACHER.pth
    python -m tools.generate_token_labels --data-path IMAGENET \
        --output-dir MAPS --input-size 576 \
        --pretrained --arch dm_nfnet_f6.dm_in1k
    python -m tools.generate_token_labels --data-path IMAGENET \
        --output-dir MAPS --check

The teacher is a classifier of timm or this project with the classes of the data set. Each image is resized to a
square without cropping, and the teacher's classifier is applied to every position of its last feature map. The
logits are interpolated to 18 x 18.

A map is `<output-dir>/<class folder>/<image stem>.pt`, a tensor (2, 5, 18, 18): logits, largest first, then
class indices. This is the format of the published maps (label_top5_train_nfnet, from NFNet-F6 at 576 pixels,
whose feature map is 18 x 18), e.g. `label_top5_train_nfnet/n01440764/n01440764_18.pt`. Maps are float16, or
float32 with more than 2,048 classes, whose indices float16 cannot represent.

A second call keeps the existing maps, also another teacher's, and resumes where the first one stopped. Under
torchrun the processes share the images. `--check` checks that all maps exist, are intact and fit the data set.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg, is_model_pretrained
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from inputs.catalogue import build_dataset
from inputs.images import ImageDataset
from inputs.label_maps import MAP_SIZE, check_label_maps, encode_label_map, image_map_path
from inputs.loader import EvalLoader, KeyedImages
from models import load_checkpoint
from runtime.cli import run_cli
from runtime.processes import Distributed, init_distributed
from training.arguments import POSITIVE, WORKERS, Parser, class_list, image_size
from training.options import default_workers
from training.precision import Precision, choose_precision, set_up_device
from utils import UserError, atomic_write, make_directory, one_line

WRITERS = 16  # threads, which mostly wait for the disk


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    dist = init_distributed(args.device)
    set_up_device(dist.device)
    dataset = build_dataset(
        args.data_set, args.data_path, "train", inat_category=args.inat_category, classes=args.classes
    )
    paths = [image_map_path(args.output_dir, dataset.path(index)) for index in range(len(dataset))]
    path, images = Counter(paths).most_common(1)[0]
    if images > 1:
        raise UserError(f"{images} images would share the label map {path}; rename all but one of them")
    if args.check:
        check_label_maps(dataset, args.output_dir, read=len(dataset))
        print(f"{len(paths)} label maps in {args.output_dir}, all intact")
    else:
        generate(args, dataset, paths, dist)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__, prog="python -m tools.generate_token_labels")
    add = parser.add_argument_group("data").add_argument
    add("--data-path", metavar="DIR", help="folder of the data set, as in training")
    add("--data-set", default="FOLDER", metavar="NAME", help="name of the data set, as in training")
    add("--classes", type=class_list, metavar="A,B,...", help="only these classes, as in training")
    add("--inat-category", default="name", metavar="RANK", help="INAT, INAT19: rank, as in training")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="folder of the label maps")
    add("--check", action="store_true", help="write nothing; check that all maps exist, are intact and fit the data")
    add = parser.add_argument_group("teacher").add_argument
    add("--model-path", type=Path, metavar="CKPT", help="checkpoint from this project, the authors' code or timm")
    add("--arch", metavar="NAME", help="model name, if the checkpoint does not contain it")
    add("--pretrained", action="store_true", help="use timm's pretrained weights")
    add("--input-size", type=image_size, metavar="PIXELS", help="image side or HEIGHTxWIDTH (default: the teacher's)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=POSITIVE, default=64, metavar="N", help="images per step")
    add("--num-workers", type=WORKERS, default=default_workers(), metavar="N", help="loader processes; 0: none")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--amp", default="none", choices=["auto", "bf16", "fp16", "none"], help="mixed precision")
    parser.set_defaults(dtype="float32")
    args = parser.parse_args(argv)
    if not args.check and (bool(args.model_path) == args.pretrained or (args.pretrained and not args.arch)):
        raise UserError("the teacher is either --model-path CKPT or --pretrained --arch NAME")
    return args


def generate(args: argparse.Namespace, dataset: ImageDataset, paths: Sequence[Path], dist: Distributed) -> None:
    """Write this process's share of the missing maps."""
    model, samples = load_teacher(args, dataset.class_names)
    model, precision = model.to(dist.device), choose_precision(args, dist.device)
    wanted = np.flatnonzero([not path.exists() for path in paths])
    dist.barrier()  # so that no process writes maps before all have determined `wanted`
    for folder in {paths[index].parent for index in wanted}:
        make_directory(folder)
    loader = EvalLoader(samples(dataset.subset(wanted)), args.batch_size, dist, args.num_workers, pin_memory=True)
    bar = tqdm(desc="writing maps", total=-(-len(wanted) // dist.world_size), unit=" maps", disable=not dist.is_main)
    with ThreadPoolExecutor(WRITERS) as pool, bar:
        for batch in loader:
            maps = label_maps(model, batch.images, precision)
            for _ in pool.map(write_map, [paths[wanted[index]] for index in batch.indices.tolist()], maps):
                bar.update()
    if dist.is_main:
        print(f"{len(paths)} label maps in {args.output_dir}, {len(wanted)} of them new")


def write_map(path: Path, label_map: Tensor) -> None:
    atomic_write(path, partial(torch.save, label_map))


def load_teacher(
    args: argparse.Namespace, class_names: Sequence[str]
) -> tuple[nn.Module, Callable[[ImageDataset], KeyedImages]]:
    """Load the teacher; returns the model, and a function that prepares a data set's images for it.

    Raises:
        UserError: the teacher does not exist or does not have the data set's classes.
    """
    classes = f"the {len(class_names)} classes of --data-set {args.data_set}"
    if args.pretrained:
        cfg = get_pretrained_cfg(args.arch) if is_model_pretrained(args.arch) else None
        if cfg is None or cfg.num_classes != len(class_names):
            raise UserError(f"--arch {args.arch}: timm has no pretrained weights of this model for {classes}")
        size = {"img_size": args.input_size} if args.input_size and cfg.fixed_input_size else {}
        try:
            model = timm.create_model(args.arch, pretrained=True, **size).eval()
        except (OSError, RuntimeError, ValueError) as error:  # the download failed, or the size is invalid
            raise UserError(f"--arch {args.arch} --pretrained: {one_line(error)}") from error
        config = resolve_data_config(model=model)
        input_size = args.input_size or config["input_size"][1:]
    else:
        info = load_checkpoint(args.model_path, args.arch, input_size=args.input_size)
        named = info.checkpoint.get("class_names")
        if info.num_classes != len(class_names) or named not in (None, list(class_names)):
            raise UserError(f"--model-path {args.model_path}: its {info.num_classes} classes are not {classes}")
        model, config, input_size = info.model, vars(info), info.input_size
    uncropped = {"interpolation": config["interpolation"], "crop_pct": 1.0, "crop_mode": "squash"}
    transform = create_transform(tuple(input_size), **uncropped, use_prefetcher=True)  # to uint8
    return model, partial(KeyedImages, transform=transform, mean=config["mean"], std=config["std"])


@torch.inference_mode()
def label_maps(model: nn.Module, images: Tensor, precision: Precision) -> list[Tensor]:
    """Return the label maps, (2, 5, 18, 18) each, of images (B, 3, H, W)."""
    with precision.autocast():
        logits = position_logits(model, images)
    logits = F.interpolate(logits.float(), (MAP_SIZE, MAP_SIZE), mode="bilinear", antialias=True)
    if not logits.isfinite().all():
        raise UserError("the teacher's logits are not finite; use --amp none, or check --model-path")
    return [encode_label_map(of_image).cpu() for of_image in logits]


def position_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Apply a classifier to each position of its last feature map: images (B, 3, H, W) to (B, classes, h, w).

    The features of a position pass through the model's token classifier (`aux_head`) if it has one, otherwise through
    its head, which pools and normalises, as a feature map with a single position.
    """
    prefix = getattr(model, "num_prefix_tokens", 0)
    features = model.forward_features(images)
    if features.ndim == 3:  # tokens; the position's features also replace the prefix tokens
        stride = model.feature_info[-1]["reduction"]
        grid = [side // stride for side in images.shape[2:]]
        positions = features[:, prefix:]
        alone = positions.flatten(0, 1)[:, None].expand(-1, 1 + prefix, -1)
    elif str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC"):
        grid, positions = features.shape[1:3], features.flatten(1, 2)
        alone = positions.flatten(0, 1)[:, None, None]
    else:
        grid, positions = features.shape[2:], features.flatten(2).mT
        alone = positions.flatten(0, 1)[:, :, None, None]
    if getattr(model, "token_label", False):
        logits = model.aux_head(positions)
    else:
        logits = model.forward_head(alone).unflatten(0, positions.shape[:2])
    return logits.mT.unflatten(2, grid)


if __name__ == "__main__":
    run_cli(main)
