"""The flags of classification: data, augmentation, token labels, distillation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from timm.models import get_pretrained_cfg

import models
from inputs.inaturalist import RANKS
from training.arguments import AMOUNT, FRACTION, Parser, class_list, number, part, policy, split_share, switch
from training.options import TaskFlags, refuse

JITTER = number(float, 0, 10)
SIZES = number(int, 1, 10**4)
# Training on label maps excludes mixing images, and the published runs with them did not repeat augmentation.
TOKEN_LABEL_DEFAULTS = {"mixup": 0.0, "cutmix": 0.0, "repeated_aug": False, "train_interpolation": "random"}


def add_flags(parser: Parser) -> None:
    """All of them."""
    for add_group in (add_data_flags, add_augmentation_flags, add_token_label_flags, add_distillation_flags):
        add_group(parser)


def add_data_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("data")).add_argument
    add(
        "--data-set",
        metavar="NAME",
        help="DIGITS CIFAR10 CIFAR100 IMNET FOLDER FLOWERS CARS PETS INAT INAT19 CSV hfds/... wds/... "
        "(default: IMNET with --data-path, CSV if it is a table, else DIGITS)",
    )
    add("--data-path", metavar="DIR", help="where the data set lies")
    add("--val-path", metavar="FILE", help="of CSV: the table to validate on")
    add(
        "--csv-columns",
        nargs="+",
        default=("file", "label"),
        metavar="NAME",
        help="of CSV: the columns of files and labels, and of splits if there is one (default: file label)",
    )
    switch(group, "--download", False, "fetch the data set where that is possible")
    add(
        "--val-split",
        type=split_share,
        metavar="P[:SEED]",
        help="of class folders without val/: keep this part of each class for validation, the same for every --seed",
    )
    add(
        "--train-part",
        type=part,
        metavar="P[:SEED]",
        help="train on this part of each class's images, the same for every --seed",
    )
    add("--in-chans", type=int, default=3, choices=[1, 3, 4], help="channels of the images: grey, RGB, RGB and alpha")
    add("--mean", type=number(float), nargs="+", metavar="X", help="of each channel, or of all (default: ImageNet's)")
    add("--std", type=number(float, 0, above=True), nargs="+", metavar="X", help="as --mean")
    add(
        "--pixel-range",
        type=number(float),
        nargs=2,
        metavar=("MIN", "MAX"),
        help="black and white of images of more than 8 bits, such as 0 4095 (default: 0 65535)",
    )
    switch(group, "--balanced-sampling", False, "draw every class equally often, with replacement")
    add("--classes", type=class_list, metavar="A,B,...", help="only these classes, by name or number, in this order")
    add(
        "--inat-category",
        default="name",
        metavar="RANK",
        help="what INAT19 classifies: %(choices)s",
        choices=RANKS,
    )
    add(
        "--eval-crop-pct",
        "--crop-pct",
        type=number(float, 0.01, 1),
        metavar="P",
        help="evaluation: the part of the resized image's side that is kept (default: the model's)",
    )


def add_augmentation_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("augmentation")).add_argument
    add(
        "--scale",
        type=FRACTION,
        nargs=2,
        default=(0.08, 1.0),
        metavar=("MIN", "MAX"),
        help="part of the image's area that a random crop takes",
    )
    add(
        "--ratio",
        type=number(float, 0, above=True),
        nargs=2,
        default=(3 / 4, 4 / 3),
        metavar=("MIN", "MAX"),
        help="of a random crop's sides",
    )
    add("--hflip", type=FRACTION, metavar="P", help="mirroring (default: 0.5, for DIGITS 0)")
    add("--vflip", type=FRACTION, default=0.0, metavar="P", help="turning upside down")
    switch(group, "--no-aug", False, "only resize images and crop the centre; turns mixup and cutmix off")
    add("--color-jitter", type=JITTER, default=0.4, metavar="X", help="strength; RandAugment takes its place")
    add(
        "--aa",
        type=policy,
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm's name of a RandAugment or AutoAugment policy, or none",
    )
    add("--train-interpolation", default="bicubic", choices=["bicubic", "bilinear", "random"], help="of the crops")
    add("--smoothing", type=FRACTION, default=0.1, metavar="E", help="label smoothing")
    switch(group, "--bce-loss", False, "binary cross-entropy for each class")
    add("--class-weights", default="none", choices=["none", "auto"], help="auto: in inverse proportion to their images")
    add("--reprob", type=FRACTION, default=0.0, metavar="P", help="random erasing")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"], help="what erased places hold")
    add("--recount", type=number(int, 1, 100), default=1, metavar="N", help="erased boxes")
    switch(group, "--repeated-aug", False, "three augmentations of each image, spread over the processes")
    add("--mixup", type=AMOUNT, default=0.8, metavar="ALPHA", help="mixup; 0: off")
    add("--cutmix", type=AMOUNT, default=1.0, metavar="ALPHA", help="cutmix; 0: off")
    add("--cutmix-minmax", type=FRACTION, nargs=2, metavar=("MIN", "MAX"), help="side of cutmix's box, not its alpha")
    add("--mixup-prob", type=FRACTION, default=1.0, metavar="P", help="of mixing a batch")
    add("--mixup-switch-prob", type=FRACTION, default=0.5, metavar="P", help="of cutmix where both are on")
    add("--mixup-mode", default="batch", choices=["batch", "pair", "elem"], help="what shares one mixing ratio")


def add_token_label_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("token labels (pyramid models)")).add_argument
    switch(group, "--token-label", False, "train on label maps; turns mixup, cutmix and repeated augmentation off")
    add("--token-label-data", metavar="DIR", help="the label maps")
    add(
        "--token-label-size",
        type=SIZES,
        metavar="N",
        help="side of the token grid (default: follows the model)",
    )
    add(
        "--token-label-crop",
        default="right",
        choices=["right", "reference"],
        help="how a crop is cut from a map; reference: axes swapped, as released",
    )
    switch(group, "--ground-truth", False, "blend the true class into the teacher's class target")
    add("--dense-weight", type=AMOUNT, default=0.5, metavar="W", help="of the token loss")
    add("--cls-weight", type=AMOUNT, default=1.0, metavar="W", help="of the class loss")


def add_distillation_flags(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", default="none", choices=["none", "soft", "hard"], help="as in DeiT")
    add("--teacher-model", metavar="NAME", help="any model of timm's")
    add("--teacher-path", metavar="PATH", help="its weights")
    add("--distillation-alpha", type=FRACTION, default=0.5, metavar="A", help="weight of the teacher's part")
    add(
        "--distillation-tau",
        type=number(float, 0, above=True),
        default=1.0,
        metavar="T",
        help="soft: temperature",
    )


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
    """The data set that a path or its absence suggests, and the crop that the model's authors evaluate with."""
    found = get_pretrained_cfg(models.resolve_arch(args["arch"]))
    return {
        "data_set": default_data_set(args["data_path"]),
        "eval_crop_pct": 0.875 if found is None else found.crop_pct,
    }


def mixes(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix make distributions of the targets."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


def check(args: argparse.Namespace) -> None:
    """Refuse what contradicts itself."""
    distilling = args.distillation_type != "none"
    given_statistics = [values for values in (args.mean, args.std) if values is not None]
    refuse(
        (
            any(len(values) not in (1, args.in_chans) for values in given_statistics),
            f"--mean and --std need one number, or one for each of --in-chans {args.in_chans}",
        ),
        (len(args.csv_columns) not in (2, 3), "--csv-columns takes two names, or three with that of the splits"),
        (
            args.pixel_range and args.pixel_range[0] >= args.pixel_range[1],
            "--pixel-range: MIN must be below MAX",
        ),
        (args.in_chans == 4 and args.aa, "--in-chans 4 excludes --aa: its operations take grey and RGB images"),
        (
            args.token_label and (args.bce_loss or args.class_weights != "none"),
            "--token-label excludes --bce-loss and --class-weights",
        ),
        (args.token_label and mixes(args), "--token-label excludes --mixup and --cutmix: it mixes by MixToken"),
        (args.token_label and not args.token_label_data, "--token-label needs --token-label-data DIR"),
        (args.token_label_data and not args.token_label, "--token-label-data needs --token-label"),
        (args.token_label and distilling, "--token-label excludes --distillation-type"),
        (
            mixes(args) and args.batch_size % 2,
            f"mixup and cutmix pair images: --batch-size {args.batch_size} has to be even (or turn both off)",
        ),
        (
            args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1],
            "--cutmix-minmax: MIN has to be below MAX",
        ),
        (
            distilling and not (args.teacher_model and args.teacher_path),
            f"--distillation-type {args.distillation_type} needs --teacher-model NAME and --teacher-path PATH",
        ),
        (
            not distilling and (args.teacher_model or args.teacher_path),
            "a teacher needs --distillation-type soft or hard",
        ),
    )


FLAGS = TaskFlags(add_flags, implied, derived, check)
