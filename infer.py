#!/usr/bin/env python
"""Evaluate a trained model on a data set, or predict images with it and explain the predictions.

infer.py --model-path runs/mine --data-path /path/to/imagenet      loss, acc@1, acc@5, images/s
infer.py --model-path CKPT --image a.jpg folder/ --explain         most likely classes, with evidence maps
infer.py --model-path CKPT --image folder/ --output table.csv      predictions as a table
infer.py --model-path spectformer_h_n --image a.jpg                a model whose weights the project includes
"""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import models
from detection.evaluate import evaluate_detector
from detection.loading import load_detector
from detection.predict import draw_objects_in
from inference.evaluate import average_mirrored, run_evaluation
from inference.predict import run_prediction
from inputs.inaturalist import RANKS
from models.checkpoints import peek, read_checkpoint
from models.pretrained import find_checkpoint, load_checkpoint
from runtime.cli import run_cli
from runtime.processes import init_distributed
from training.arguments import (
    FRACTION,
    POSITIVE,
    WORKERS,
    FlagTable,
    KeyValues,
    Parser,
    class_list,
    image_size,
    number,
    python_module,
    split_share,
    text,
)
from training.precision import set_up_device
from utils import UserError

FLAGS: FlagTable = {
    "model": [
        ("--model-path", text, None, "CKPT", "checkpoint, run directory (its best checkpoint) or model name"),
        ("--arch", text, None, "NAME", "model name, for a file that only contains weights"),
        ("--model-kwargs", KeyValues, {}, "KEY=VALUE", "constructor arguments in addition to the checkpoint's"),
        ("--mixer-module", python_module, None, "FILE.py", "file that adds the model's custom mixers, as in training"),
        ("--ema", bool, None, None, "use the averaged weights (default: if the checkpoint has them)"),
        ("--input-size", image_size, None, "PIXELS", "image side or HEIGHTxWIDTH (default: the checkpoint's)"),
    ],
    "evaluation": [
        ("--data-set", text, None, "NAME", "as in training (default: the checkpoint's, or IMNET)"),
        ("--data-path", text, None, "DIR", "data set folder"),
        ("--csv-columns", (text, "+"), None, "NAME", "as in training (default: the checkpoint's)"),
        ("--split", ["val", "test"], "val", None, "split to evaluate"),
        ("--classes", class_list, None, "A,B,...", "only these (default: the checkpoint's that the data has)"),
        ("--val-split", split_share, None, "P[:SEED]", "share for class folders without val/ (default: the run's)"),
        ("--inat-category", list(RANKS), "name", None, "taxonomic rank of the INAT19 classes"),
        ("--skip-bad-images", bool, False, None, "skip and count unreadable images"),
        ("--report", Path, None, "DIR", "write a confusion matrix and per-class accuracies to this folder"),
    ],
    "prediction": [
        ("--image", (Path, "+"), None, "FILE", "images or image folders to predict"),
        ("--topk", POSITIVE, 5, "N", "number of classes to show per image"),
        ("--quiet", bool, False, None, "do not print a line per image"),
        ("--embeddings", Path, None, "NPY", "write the images' features to this file, and their names to a .txt file"),
        ("--drawings", text, "detections", "DIR", "for a detector: where to save images with the detected objects"),
        ("--min-score", FRACTION, 0.5, "P", "for a detector: lowest score to draw"),
    ],
    "both": [
        ("--output", Path, None, "FILE", "write the results to a .json file; with --image also .csv or .parquet"),
        ("--eval-crop-pct", number(float, 0.1, 1), None, "P", "centre crop / resized side (default: as trained)"),
        ("--batch-size", POSITIVE, 128, "N", "images per process and step"),
        ("--num-workers", WORKERS, min(4, os.cpu_count() or 1), "N", "loader processes; 0: load in the main process"),
        ("--tta", bool, False, None, "average the logits of each image and its mirror image"),
        ("--pin-mem", bool, True, None, "use page-locked batches, for faster copies to a GPU"),
        ("--device", text, "auto", None, "auto, cpu, cuda or cuda:N"),
        ("--amp", ["auto", "bf16", "fp16", "none"], "auto", None, "mixed precision; auto: only on CUDA"),
    ],
}
# Flags that detectors do not support.
OF_CLASSIFIERS = {"arch", "model_kwargs", "input_size", "classes", "val_split", "skip_bad_images", "eval_crop_pct"}
OF_CLASSIFIERS |= {"explain", "embeddings", "tta"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line.

    Raises:
        UserError: if an argument is unknown, malformed or contradicts another one.
    """
    parser = Parser("Evaluate a trained model on a data set, or predict images with it.", usage="%(prog)s [flags]")
    parser.add_flags(FLAGS)
    help_text = "overlay each image with the evidence for its class and save it (default: in explained/)"
    parser.add_argument("--explain", nargs="?", const="explained", metavar="DIR", help=help_text)
    parser.set_defaults(dtype="float32")
    args = parser.parse_args(argv)
    if args.model_path is None and args.arch is None:
        raise UserError(
            "--model-path is missing: set it to a checkpoint, a run directory or one of " + ", ".join(models.shipped())
        )
    if args.model_path is None:  # only --arch: a model whose weights the project includes
        args.model_path, args.arch = args.arch, None
    if (args.explain is not None or args.embeddings is not None) and args.image is None:
        raise UserError("--explain and --embeddings need --image")
    if args.explain is not None and args.tta:
        raise UserError("--explain does not support --tta: it explains the prediction of a single image")
    if args.image is not None and (args.data_set or args.data_path or args.report):
        raise UserError("--image predicts images: leave out --data-set, --data-path and --report")
    return args


def with_trained_data(args: argparse.Namespace, loaded: models.LoadedModel) -> argparse.Namespace:
    """Complete the arguments: data set, split, size and preprocessing default to those of the checkpoint."""
    trained = loaded.checkpoint.get("args") or {}
    data_set = args.data_set or trained.get("data_set") or "IMNET"
    csv_columns = args.csv_columns or trained.get("csv_columns") or ("file", "label")
    keeps_split = data_set == trained.get("data_set") and len(csv_columns) == 2  # a third column is the split
    val_split = trained.get("val_split") if args.val_split is None and keeps_split else None
    settled = {
        "data_set": data_set,
        "val_split": args.val_split or (tuple(val_split) if val_split else None),
        "input_size": loaded.input_size,
        "eval_crop_pct": loaded.crop_pct,
        "skip_bad_images": args.skip_bad_images or args.image is not None,  # prediction lists them
        "pixel_range": trained.get("pixel_range"),
        "csv_columns": csv_columns,
        "val_path": None,
    }
    return argparse.Namespace(**vars(args) | settled)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    dist = init_distributed(args.device)
    if args.image is not None and dist.world_size > 1:
        raise UserError("--image runs in a single process: start infer.py without torchrun")
    path = find_checkpoint(args.model_path)
    is_detector = bool(peek(path).get("detector"))
    set_up_device(dist.device, fixed_sizes=not is_detector)  # as in training
    if is_detector:
        for name in sorted(OF_CLASSIFIERS):
            if getattr(args, name) not in (None, False, {}):
                raise UserError(f"--{name.replace('_', '-')} is for classifiers; {path} contains a detector")
        run = evaluate_detector if args.image is None else draw_objects_in
        run(args, dist, load_detector(read_checkpoint(path), path, args.ema))
        return
    loaded = load_checkpoint(path, args.arch, ema=args.ema, input_size=args.input_size, model_kwargs=args.model_kwargs)
    if args.eval_crop_pct is not None:
        loaded = dataclasses.replace(loaded, crop_pct=args.eval_crop_pct)
    channels = loaded.model_kwargs.get("in_chans", 3)
    if channels != len(loaded.mean):
        raise UserError(f"{path}: the model expects {channels} channels, but its mean has {len(loaded.mean)} values")
    if args.tta:
        average_mirrored(loaded.model)
    run = run_evaluation if args.image is None else run_prediction
    run(with_trained_data(args, loaded), dist, loaded)


if __name__ == "__main__":
    run_cli(main)
