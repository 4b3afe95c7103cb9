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
# Training on label maps excludes mixing images, and the published runs with them did not repeat augmentation.
TOKEN_LABEL_DEFAULTS = {"mixup": 0.0, "cutmix": 0.0, "repeated_aug": False, "train_interpolation": "random"}

CROP = number(float, 0.01, 1)

TABLE: FlagTable = {
    "data": [
        ("--data-set", text, None, "NAME", f"{DATA_SETS} (default: from --data-path, or DIGITS)"),
        ("--data-path", text, None, "DIR", "where the data set is; a table (.csv, .tsv) is CSV, a folder IMNET"),
        ("--val-path", text, None, "FILE", "CSV: the table to validate on"),
        ("--csv-columns", (text, "+"), ("file", "label"), "NAME", "CSV: files, labels, splits (default: file label)"),
        ("--download", bool, False, None, "download the data set if it is missing and can be downloaded"),
        ("--val-split", split_share, None, "P[:SEED]", "validate on this share of each class, where there is no val/"),
        ("--train-part", split_share, None, "P[:SEED]", "train on this share of each class, the same for every --seed"),
        ("--in-chans", number(int, 1, 4), 3, "N", "channels of the images: 1 grey, 3 RGB, 4 RGB and alpha"),
        ("--mean", (number(float), "+"), None, "X", "mean of each channel, or of all (default: ImageNet's)"),
        ("--std", (ABOVE_ZERO, "+"), None, "X", "standard deviation of each channel, or of all"),
        ("--pixel-range", (number(float), 2), None, ("MIN", "MAX"), "of images of over 8 bits (default: 0 65535)"),
        ("--balanced-sampling", bool, False, None, "draw every class equally often, with replacement"),
        ("--classes", class_list, None, "A,B,...", "only these classes, by name or number, in this order"),
        ("--inat-category", list(RANKS), "name", "RANK", "what INAT19 classifies: %(choices)s"),
        ("--eval-crop-pct --crop-pct", CROP, None, "P", "evaluation: part of the side kept (default: the model's)"),
    ],
    "augmentation": [
        ("--scale", (FRACTION, 2), (0.08, 1.0), ("MIN", "MAX"), "share of the image's area in a random crop"),
        ("--ratio", (ABOVE_ZERO, 2), (3 / 4, 4 / 3), ("MIN", "MAX"), "aspect ratio of a random crop"),
        ("--hflip", FRACTION, None, "P", "probability of mirroring (default: 0.5, for DIGITS 0)"),
        ("--vflip", FRACTION, 0.0, "P", "probability of turning upside down"),
        ("--no-aug", bool, False, None, "only resize images and crop the centre, without mixup and cutmix"),
        ("--color-jitter", number(float, 0, 10), 0.4, "X", "strength of colour jitter, where --aa is none"),
        ("--aa", policy, "rand-m9-mstd0.5-inc1", "POLICY", "timm's RandAugment or AutoAugment policy, or none"),
        ("--train-interpolation", ["bicubic", "bilinear", "random"], "bicubic", None, "of the random crops"),
        ("--smoothing", FRACTION, 0.1, "E", "label smoothing"),
        ("--bce-loss", bool, False, None, "binary cross-entropy for each class"),
        ("--class-weights", ["none", "auto"], "none", None, "auto: inversely proportional to their images"),
        ("--reprob", FRACTION, 0.0, "P", "probability of random erasing"),
        ("--remode", ["const", "rand", "pixel"], "pixel", None, "fill: zeros, one random colour, or noise"),
        ("--recount", number(int, 1, 100), 1, "N", "number of erased boxes"),
        ("--repeated-aug", bool, False, None, "three augmentations of each image, spread over the processes"),
        ("--mixup", AMOUNT, 0.8, "ALPHA", "mixup; 0: off"),
        ("--cutmix", AMOUNT, 1.0, "ALPHA", "cutmix; 0: off"),
        ("--cutmix-minmax", (FRACTION, 2), None, ("MIN", "MAX"), "side of cutmix's box, instead of its alpha"),
        ("--mixup-prob", FRACTION, 1.0, "P", "probability of mixing a batch"),
        ("--mixup-switch-prob", FRACTION, 0.5, "P", "probability of cutmix where both are on"),
        ("--mixup-mode", ["batch", "pair", "elem"], "batch", None, "what shares a mixing ratio"),
    ],
    "token labels (pyramid models)": [
        ("--token-label", bool, False, None, "train on label maps, without mixup, cutmix and repeated augmentation"),
        ("--token-label-data", text, None, "DIR", "the label maps"),
        ("--token-label-size", number(int, 1, 10**4), None, "N", "side of the token grid (default: the model's)"),
        ("--token-label-crop", ["right", "reference"], "right", None, "reference: axes swapped, as published"),
        ("--ground-truth", bool, False, None, "blend the true class into the teacher's class target"),
        ("--dense-weight", AMOUNT, 0.5, "W", "weight of the token loss"),
        ("--cls-weight", AMOUNT, 1.0, "W", "weight of the class loss"),
    ],
    "distillation": [
        ("--distillation-type", ["none", "soft", "hard"], "none", None, "as in DeiT"),
        ("--teacher-model", text, None, "NAME", "a model of ours or of timm"),
        ("--teacher-path", text, None, "PATH", "its weights"),
        ("--distillation-alpha", FRACTION, 0.5, "A", "weight of the teacher's part of the loss"),
        ("--distillation-tau", ABOVE_ZERO, 1.0, "T", "temperature of soft distillation"),
    ],
}


def implied(given: Mapping[str, Any]) -> dict[str, Any]:
    """What --token-label, --no-aug and --in-chans 4 imply."""
    values = {}
    if given.get("token_label"):
        values |= TOKEN_LABEL_DEFAULTS
    if given.get("no_aug"):
        values |= {"mixup": 0.0, "cutmix": 0.0, "reprob": 0.0, "repeated_aug": False}
    if given.get("in_chans") == 4:  # Pillow's colour operations do not take an alpha channel
        values |= {"aa": ""}
    return values


def default_data_set(path: str | None) -> str:
    """DIGITS without a --data-path, CSV for a table, IMNET for a folder."""
    return "DIGITS" if not path else "CSV" if path.endswith((".csv", ".tsv")) else "IMNET"


def derived(args: Mapping[str, Any]) -> dict[str, Any]:
    """The data set, which depends on --data-path, and the evaluation crop of the model's authors.

    Small images and glyphs are seen whole.
    """
    found = get_pretrained_cfg(models.resolve_arch(args["arch"]))
    data_set = args["data_set"] or default_data_set(args["data_path"])
    crop_pct = 0.875 if found is None else found.crop_pct
    whole = max(args["input_size"]) <= SMALL_INPUT or dataset_spec(data_set).glyphs
    return {"data_set": data_set, "eval_crop_pct": 1.0 if whole else crop_pct}


def mixes(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix turn labels into distributions."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def distils(args: argparse.Namespace) -> bool:
    return args.distillation_type != "none"


def is_empty(limits: tuple[float, float] | None) -> bool:
    return limits is not None and limits[0] >= limits[1]


CHECKS: Checks = [
    (lambda a: len(a.csv_columns) not in (2, 3), "--csv-columns takes two names, or three with that of the splits"),
    (lambda a: a.in_chans == 2, "--in-chans 2: images have 1, 3 or 4 channels"),
    (
        lambda a: any(len(values) not in (1, a.in_chans) or max(values) > 1 for values in (a.mean, a.std) if values),
        "--mean and --std take one number from 0 to 1, or one for each of --in-chans {in_chans}",
    ),
    (lambda a: a.val_split and a.val_split[0] == 1, "--val-split 1 leaves nothing to train on"),
    (lambda a: is_empty(a.pixel_range), "--pixel-range: MIN must be below MAX"),
    (lambda a: a.in_chans == 4 and a.aa, "--in-chans 4 excludes --aa, which takes grey and RGB images"),
    (lambda a: a.token_label and mixes(a), "--token-label excludes --mixup and --cutmix: it mixes by MixToken"),
    (lambda a: a.token_label and (a.bce_loss or a.class_weights != "none"), "--token-label has a loss of its own"),
    (lambda a: a.token_label and distils(a), "--token-label excludes --distillation-type"),
    (lambda a: a.token_label != bool(a.token_label_data), "--token-label and --token-label-data DIR need each other"),
    (lambda a: mixes(a) and a.batch_size % 2, "--batch-size {batch_size}: mixup and cutmix need an even one"),
    (lambda a: is_empty(a.cutmix_minmax), "--cutmix-minmax: MIN must be below MAX"),
    (
        lambda a: {bool(a.teacher_model), bool(a.teacher_path)} != {distils(a)},
        "--distillation-type soft or hard, --teacher-model NAME and --teacher-path PATH need each other",
    ),
]

FLAGS = TaskFlags(TABLE, implied, derived, CHECKS)
