"""The flags of classification: data, augmentation, token labels, distillation."""

import argparse
from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg

import models
from inputs.catalogue import dataset_spec
from inputs.inaturalist import RANKS
from inputs.transforms import SMALL_INPUT
from training.arguments import ABOVE_ZERO, AMOUNT, FRACTION, FlagTable, class_list, number, policy, split_share, text
from training.options import Checks, TaskFlags

DATA_SETS = "DIGITS CIFAR10 CIFAR100 IMNET FOLDER FLOWERS CARS PETS INAT INAT19 CSV hfds/... wds/..."
CROP = number(float, 0.01, 1)

TABLE: FlagTable = {
    "data": [
        ("--data-set", text, None, "NAME", f"{DATA_SETS} (default: from --data-path, or DIGITS)"),
        ("--data-path", text, None, "DIR", "folder of the data set; a table (.csv, .tsv) implies CSV, a folder IMNET"),
        ("--val-path", text, None, "FILE", "CSV: validation table"),
        ("--csv-columns", (text, "+"), ("file", "label"), "NAME", "CSV: file, label, split (default: file label)"),
        ("--download", bool, False, None, "download the data set if it is missing, where possible"),
        ("--val-split", split_share, None, "P[:SEED]", "without val/: fraction of each class to validate on"),
        ("--train-part", split_share, None, "P[:SEED]", "fraction of each class to train on, independent of --seed"),
        ("--in-chans", number(int, 1, 4), 3, "N", "image channels: 1 grey, 3 RGB, 4 RGB and alpha"),
        ("--mean", (number(float), "+"), None, "X", "mean of each channel, or one for all (default: ImageNet's)"),
        ("--std", (ABOVE_ZERO, "+"), None, "X", "standard deviation of each channel, or one for all"),
        ("--pixel-range", (number(float), 2), None, ("MIN", "MAX"), "range of 16-bit images (default: 0 65535)"),
        ("--balanced-sampling", bool, False, None, "draw every class equally often, with replacement"),
        ("--classes", class_list, None, "A,B,...", "use only these classes, by name or number, in this order"),
        ("--inat-category", list(RANKS), "name", "RANK", "INAT, INAT19: rank to classify: %(choices)s"),
        ("--eval-crop-pct --crop-pct", CROP, None, "P", "evaluation: fraction of the side kept (default: the model's)"),
    ],
    "augmentation": [
        ("--scale", (FRACTION, 2), (0.08, 1.0), ("MIN", "MAX"), "relative area of random crops (default: 0.08 1)"),
        ("--ratio", (ABOVE_ZERO, 2), (3 / 4, 4 / 3), ("MIN", "MAX"), "aspect ratio of random crops (default: 3/4 4/3)"),
        ("--hflip", FRACTION, None, "P", "probability of a horizontal flip (default: 0.5, for DIGITS 0)"),
        ("--vflip", FRACTION, 0.0, "P", "probability of a vertical flip"),
        ("--no-aug", bool, False, None, "only resize and centre-crop images, without mixup and cutmix"),
        ("--color-jitter", number(float, 0, 10), 0.4, "X", "strength of color jitter, if --aa is none"),
        ("--aa", policy, "rand-m9-mstd0.5-inc1", "POLICY", "RandAugment or AutoAugment policy of timm, or none"),
        ("--train-interpolation", ["bicubic", "bilinear", "random"], "bicubic", None, "interpolation of random crops"),
        ("--smoothing", FRACTION, 0.1, "E", "label smoothing"),
        ("--bce-loss", bool, False, None, "use binary cross-entropy for each class"),
        ("--class-weights", ["none", "auto"], "none", None, "weights of the loss; auto: inverse class frequency"),
        ("--reprob", FRACTION, 0.0, "P", "probability of random erasing"),
        ("--remode", ["const", "rand", "pixel"], "pixel", None, "fill of erased boxes: zeros, one color, or noise"),
        ("--recount", number(int, 1, 100), 1, "N", "number of erased boxes"),
        ("--repeated-aug", bool, False, None, "use three augmentations of each image, spread over the processes"),
        ("--mixup", AMOUNT, 0.8, "ALPHA", "mixup alpha; 0: off"),
        ("--cutmix", AMOUNT, 1.0, "ALPHA", "cutmix alpha; 0: off"),
        ("--cutmix-minmax", (FRACTION, 2), None, ("MIN", "MAX"), "range of the cutmix box's side, instead of alpha"),
        ("--mixup-prob", FRACTION, 1.0, "P", "probability of applying mixup or cutmix to a batch"),
        ("--mixup-switch-prob", FRACTION, 0.5, "P", "probability of cutmix when both are on"),
        ("--mixup-mode", ["batch", "pair", "elem"], "batch", None, "what shares one mixing ratio"),
    ],
    "token labels (pyramid models)": [
        ("--token-label", bool, False, None, "train on label maps, without mixup, cutmix and repeated augmentation"),
        ("--token-label-data", text, None, "DIR", "folder of the label maps"),
        ("--token-label-size", number(int, 1, 10**4), None, "N", "side of the token grid (default: the model's)"),
        ("--token-label-crop", ["right", "reference"], "right", None, "reference: swap the axes, as published"),
        ("--ground-truth", bool, False, None, "blend the true class into the teacher's class target"),
        ("--dense-weight", AMOUNT, 0.5, "W", "weight of the token loss"),
        ("--cls-weight", AMOUNT, 1.0, "W", "weight of the class loss"),
    ],
    "distillation": [
        ("--distillation-type", ["none", "soft", "hard"], "none", None, "knowledge distillation, as in DeiT"),
        ("--teacher-model", text, None, "NAME", "teacher, a model of this project or of timm"),
        ("--teacher-path", text, None, "PATH", "weights of the teacher"),
        ("--distillation-alpha", FRACTION, 0.5, "A", "weight of the distillation loss"),
        ("--distillation-tau", ABOVE_ZERO, 1.0, "T", "temperature of soft distillation"),
    ],
}


def implied(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that --token-label, --no-aug and --in-chans 4 imply."""
    values = {}
    if given.get("token_label"):  # the published runs with label maps did not use repeated augmentation
        values |= {"mixup": 0.0, "cutmix": 0.0, "repeated_aug": False, "train_interpolation": "random"}
    if given.get("no_aug"):
        values |= {"mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "repeated_aug": False}
    if given.get("in_chans") == 4:  # Pillow's color operations do not support alpha
        values |= {"aa": ""}
    return values


def derived(args: Mapping[str, Any]) -> dict[str, Any]:
    """The default data set, which depends on --data-path, and the default evaluation crop of the model.

    Small images and glyphs are evaluated without cropping.
    """
    found = get_pretrained_cfg(models.resolve_arch(args["arch"]))
    data_set, path = args["data_set"], args["data_path"]
    if data_set is None:
        data_set = "DIGITS" if path is None else "CSV" if path.endswith((".csv", ".tsv")) else "IMNET"
    crop_pct = 0.875 if found is None else found.crop_pct
    whole = max(args["input_size"]) <= SMALL_INPUT or dataset_spec(data_set).glyphs
    return {"data_set": data_set, "eval_crop_pct": 1.0 if whole else crop_pct}


def mixes(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix is on, so that targets are distributions."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


CHECKS: Checks = [
    (lambda a: len(a.csv_columns) not in (2, 3), "--csv-columns takes two or three names: file, label, split"),
    (lambda a: a.in_chans == 2, "--in-chans 2: images have 1, 3 or 4 channels"),
    (
        lambda a: any(len(values) not in (1, a.in_chans) or max(values) > 1 for values in (a.mean, a.std) if values),
        "--mean and --std take one number from 0 to 1, or one for each of --in-chans {in_chans} channels",
    ),
    (lambda a: a.val_split and a.val_split[0] == 1, "--val-split 1 leaves nothing to train on"),
    (lambda a: a.pixel_range and a.pixel_range[0] >= a.pixel_range[1], "--pixel-range: MIN must be below MAX"),
    (lambda a: a.in_chans == 4 and a.aa, "--in-chans 4 excludes --aa, which supports only grey and RGB images"),
    (lambda a: a.token_label and mixes(a), "--token-label excludes --mixup and --cutmix: it uses MixToken"),
    (lambda a: a.token_label and (a.bce_loss or a.class_weights != "none"), "--token-label replaces the class loss"),
    (lambda a: a.token_label and a.distillation_type != "none", "--token-label excludes --distillation-type"),
    (lambda a: a.token_label != bool(a.token_label_data), "--token-label and --token-label-data DIR need each other"),
    (lambda a: mixes(a) and a.batch_size % 2, "--batch-size {batch_size}: mixup and cutmix need it even"),
    (lambda a: a.cutmix_minmax and a.cutmix_minmax[0] >= a.cutmix_minmax[1], "--cutmix-minmax: MIN must be below MAX"),
    (
        lambda a: {bool(a.teacher_model), bool(a.teacher_path)} != {a.distillation_type != "none"},
        "--distillation-type soft or hard, --teacher-model NAME and --teacher-path PATH need each other",
    ),
]

FLAGS = TaskFlags(TABLE, implied, derived, CHECKS)
