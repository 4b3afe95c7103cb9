#!/usr/bin/env python
"""Evaluate a checkpoint on a data set, or classify images with it; measure and explain what it predicts.

    infer.py --model-path CKPT --data-path /path/to/imagenet     loss, acc@1, acc@5, images/s; results as JSON
    infer.py --model-path CKPT --image a.jpg folder/ --explain   the likeliest classes and what spoke for them
    infer.py --arch spectformer_h_n --image a.jpg                by a model whose weights come with the project

What the model is comes from the checkpoint: ours says so, the authors' is recognised by its weights.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import models
from detection.from_checkpoint import is_detector
from detection.inference import run_detector
from inference.evaluation import run_evaluation
from inference.fields import SMALLEST_CROP
from inference.from_checkpoint import ModelInfo, build_from_checkpoint
from inference.mirrored import average_mirrored
from inference.prediction import run_prediction
from inputs.inaturalist import RANKS
from models.checkpoints import read_checkpoint
from runtime.entry_point import run_cli
from runtime.processes import init_distributed
from training.arguments import (
    FRACTION,
    POSITIVE,
    WORKERS,
    KeyValues,
    Parser,
    class_list,
    dashed,
    image_size,
    number,
    split_share,
    switch,
)
from utils import UserError


def build_parser() -> Parser:
    parser = Parser("Evaluate a checkpoint on a data set, or classify images with it.")
    add = (group := parser.add_argument_group("model")).add_argument
    add("--model-path", type=Path, metavar="CKPT", help="of training, or the authors'; or --arch alone, see there")
    add(
        "--arch",
        metavar="NAME",
        help="without --model-path: a model whose weights come with the project; with it: where the checkpoint "
        "neither says nor shows the model's name",
    )
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="constructor arguments beside the checkpoint's",
    )
    switch(group, "--ema", None, "use the average of the weights (default: if the checkpoint has one)")
    add(
        "--input-size",
        type=image_size,
        metavar="PIXELS",
        help="side, or HEIGHTxWIDTH (default: the checkpoint's); weights are resized",
    )

    add = (group := parser.add_argument_group("evaluation")).add_argument
    add(
        "--data-set",
        metavar="NAME",
        help="as in training (default: the one the checkpoint was trained on, or IMNET)",
    )
    add("--data-path", metavar="DIR", help="where the data set lies")
    add(
        "--classes",
        type=class_list,
        metavar="A,B,...",
        help="only these classes, in this order (default: as in training)",
    )
    add(
        "--val-split",
        type=split_share,
        metavar="P[:SEED]",
        help="of class folders without val/, as in training (default: the checkpoint's)",
    )
    add(
        "--inat-category",
        default="name",
        metavar="RANK",
        help="what INAT19 classifies: %(choices)s",
        choices=RANKS,
    )
    add("--report", type=Path, metavar="DIR", help="write the confusion matrix and accuracies per class there")

    add = (group := parser.add_argument_group("prediction")).add_argument
    add("--image", type=Path, nargs="+", metavar="FILE", help="images, or folders of images, to classify")
    add("--drawings", metavar="DIR", help="a detector's, over the images (default: detections/ beside the checkpoint)")
    add(
        "--explain",
        nargs="?",
        const="",
        metavar="DIR",
        help="save what spoke for the class, over the image: class activation, and the logit's drop where the "
        "image is hidden (default: explained/ beside the checkpoint)",
    )

    add = (group := parser.add_argument_group("both")).add_argument
    add("--min-score", type=FRACTION, default=0.5, metavar="P", help="of objects that are drawn")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="results as JSON (default: beside the checkpoint; for --image none)",
    )
    add(
        "--eval-crop-pct",
        type=number(float, SMALLEST_CROP, 1),
        metavar="P",
        help="part of the resized side that is kept (default: as trained)",
    )
    add("--batch-size", type=POSITIVE, default=128, metavar="N", help="images a process and step")
    add(
        "--num-workers",
        type=WORKERS,
        default=min(4, os.cpu_count() or 1),
        metavar="N",
        help="loader processes; 0: load in this one",
    )
    switch(group, "--tta", False, "average the logits of each image and of its mirror image")
    switch(group, "--pin-mem", True, "page-locked batches, for faster copies to a GPU")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--amp",
        default="auto",
        choices=["auto", "bf16", "fp16", "none"],
        help="mixed precision; auto: on CUDA, bf16 where the GPU has it",
    )
    parser.set_defaults(dtype="float32")
    return parser


def with_shipped_weights(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with the file of --arch's weights, and this folder, not the file's, to write to.

    Raises:
        UserError: no weights of it come with the project.
    """
    if args.arch is None:
        raise UserError("--model-path CKPT says what to evaluate, or --arch one of " + ", ".join(models.shipped()))
    path = models.shipped().get(models.resolve_arch(args.arch))
    if path is None:
        raise UserError(
            f"--arch {args.arch}: no weights of it come with this project, only of {', '.join(models.shipped())}; "
            "--model-path names a checkpoint"
        )
    here = {"explain": "explained" if args.explain == "" else args.explain}
    here["output"] = Path(f"{path.stem}.json") if args.output is None and args.image is None else args.output
    return argparse.Namespace(**vars(args) | here | {"model_path": path, "arch": None})


def settle(args: argparse.Namespace, info: ModelInfo) -> argparse.Namespace:
    """The arguments with what was left open taken from the checkpoint."""
    data_set = args.data_set or info.data_set or "IMNET"
    settled = {
        "data_set": data_set,
        "classes": info.classes if args.classes is None and data_set == info.data_set else args.classes,
        "val_split": info.val_split if args.val_split is None and data_set == info.data_set else args.val_split,
        "input_size": info.input_size,
        "eval_crop_pct": info.crop_pct if args.eval_crop_pct is None else args.eval_crop_pct,
    }
    return argparse.Namespace(**vars(args) | settled)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args([dashed(word) for word in (sys.argv[1:] if argv is None else argv)])
    if args.explain is not None and args.image is None:
        raise UserError("--explain needs --image")
    if args.explain is not None and args.tta:
        raise UserError("--explain is about one image, --tta averages it with its mirror image: leave one of them out")
    if args.image is not None and (args.data_set or args.data_path or args.report):
        raise UserError("--image classifies images; --data-set, --data-path and --report are for evaluation")
    if args.model_path is None:
        args = with_shipped_weights(args)
    dist = init_distributed(args.device)
    if args.image is not None and dist.world_size > 1:
        raise UserError("--image runs in one process")
    state = read_checkpoint(args.model_path)
    if is_detector(state):
        run_detector(args, dist, state)
        return
    model, info = build_from_checkpoint(
        args.model_path,
        args.arch,
        state=state,
        ema=args.ema,
        input_size=args.input_size,
        model_kwargs=args.model_kwargs,
    )
    model = model.to(dist.device)
    if args.tta:
        average_mirrored(model)
    if info.model_kwargs.get("in_chans", 3) != 3:
        raise UserError(f"{info.path}: for images of {info.model_kwargs['in_chans']} channels, these have 3")
    run = run_evaluation if args.image is None else run_prediction
    run(settle(args, info), dist, model, info)


if __name__ == "__main__":
    run_cli(main)
