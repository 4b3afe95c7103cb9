"""The command line of the mains: one parser, whose defaults a main, a recipe and a YAML file set in turn.

From weakest to strongest: the parser's own defaults (DeiT's vanilla recipe), the main's, those another flag
implies (``implied_defaults``), the ``--config`` file's, the command line.
"""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.utils import ParseKwargs

from utils import UserError

# Training on label maps excludes mixing images, and the published runs with them did not repeat augmentation.
TOKEN_LABEL_DEFAULTS = {"mixup": 0.0, "cutmix": 0.0, "repeated_aug": False, "train_interpolation": "random"}


class HelpFormatter(argparse.HelpFormatter):
    """Help at 80 columns that ends with the default where there is one to tell."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=28, width=80)

    def _get_help_string(self, action: argparse.Action) -> str:
        untold = action.default in (None, False, "", argparse.SUPPRESS) or action.default == {}
        return action.help if untold or "default" in action.help else f"{action.help} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors, and which guesses what an unknown flag meant."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_args(self, args: Sequence[str], namespace: None = None) -> argparse.Namespace:
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            word = unknown[0]
            raise UserError(f"unknown argument {word}{suggestion(word, self._option_string_actions)}")
        return known


class KeyValues(ParseKwargs):
    """timm's ``key=value ...`` with Python literals; anything else is told."""

    def __call__(self, parser, namespace, values, option_string=None):
        for value in values:
            key, equals, _ = value.partition("=")
            if not (equals and key.isidentifier()):
                raise argparse.ArgumentError(self, f"{value!r} is not of the form key=value")
        super().__call__(parser, namespace, values, option_string)


def suggestion(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """``"; did you mean X?"`` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word.split("=")[0], list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def number(kind: type, low: float = -math.inf, high: float = math.inf, above: bool = False) -> Callable:
    """An argparse type: a finite int or float within [low, high], or above low if ``above``."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}")
        if value < low or value > high or (above and value == low):
            limits = [f"{'above' if above else 'at least'} {low}"] if low > -math.inf else []
            limits += [f"at most {high}"] if high < math.inf else []
            raise argparse.ArgumentTypeError(f"{text} is out of range: it has to be {' and '.join(limits)}")
        return value

    return convert


COUNT, POSITIVE = number(int, 0), number(int, 1)
AMOUNT, FRACTION = number(float, 0), number(float, 0, 1)


def image_size(text: str) -> tuple[int, int]:
    """``"224"`` -> (224, 224); ``"192x256"`` -> height 192, width 256."""
    sides = str(text).lower().split("x")
    valid = all(side.isascii() and side.isdigit() and len(side) <= 4 and int(side) > 0 for side in sides)
    if len(sides) > 2 or not valid:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size: pixels (224) or HEIGHTxWIDTH (192x256)")
    return int(sides[0]), int(sides[-1])


def class_list(text: str) -> list[str]:
    """``"cat, dog"`` -> ["cat", "dog"]."""
    classes = [name.strip() for name in str(text).split(",")]
    if not all(classes):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of classes separated by commas")
    return classes


def policy(text: str) -> str:
    """A policy of timm's auto-augmentation, "" for none."""
    if text in ("", "none"):
        return ""
    name, *settings = text.split("-")
    build = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}.get(name)
    try:
        if any(not re.fullmatch(r"[a-z]+\d.*", setting) for setting in settings):
            raise ValueError("timm would pass such a setting over in silence")
        (build or auto_augment_transform)(text, {})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no policy; rand-m9-mstd0.5-inc1 is one") from error
    return text


def build_parser(defaults: Mapping[str, Any], description: str) -> Parser:
    """The parser of every main; ``defaults`` (attribute -> value) are the main's own."""
    parser = Parser(
        usage="%(prog)s [flags]", description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    for add_group in (
        add_run_flags,
        add_model_flags,
        add_data_flags,
        add_augmentation_flags,
        add_token_label_flags,
        add_optimizer_flags,
        add_schedule_flags,
        add_finetune_flags,
        add_distillation_flags,
        add_machine_flags,
    ):
        add_group(parser)
    unknown = set(defaults) - {action.dest for action in parser._actions}
    if unknown:
        raise ValueError(f"defaults for flags that do not exist: {sorted(unknown)}")
    parser.set_defaults(**defaults)
    return parser


def switch(group: argparse._ArgumentGroup, flag: str, default: bool, text: str) -> None:
    """A flag with its ``--no-`` twin."""
    group.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=text)


def add_run_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("the run")).add_argument
    add("--config", metavar="YAML", help="file of defaults for these flags; the command line wins")
    add("--output-dir", metavar="DIR", help="run directory (default: runs/<arch>-<data set>)")
    add("--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: the run directory's newest intact one")
    switch(group, "--eval", False, "evaluate the weights of --resume or --finetune, and stop")
    add("--seed", type=COUNT, default=0, metavar="N", help="key of every random choice")
    add("--print-freq", type=POSITIVE, default=50, metavar="N", help="updates between two lines without a terminal")
    add("--checkpoint-steps", type=COUNT, default=0, metavar="N", help="also save every N updates; 0: epochs only")
    add("--checkpoint-epochs", type=COUNT, default=100, metavar="N", help="keep a checkpoint every N epochs; 0: none")
    add("--keep-best", type=POSITIVE, default=1, metavar="K", help="how many of the best checkpoints to keep")


def add_model_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("model")).add_argument
    add("--arch", default="spectformer_xs", metavar="NAME", help="ours, or any model of timm's")
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="arguments of the model's constructor, as in depth=4 embed_dim=64",
    )
    add(
        "--input-size",
        type=image_size,
        default=(224, 224),
        metavar="PIXELS",
        help="side, or HEIGHTxWIDTH (default: 224)",
    )
    add("--drop", type=FRACTION, default=0.0, metavar="P", help="dropout before the classifier")
    add("--drop-path", type=FRACTION, metavar="P", help="stochastic depth (default: the variant's own)")
    switch(group, "--model-ema", False, "also keep, evaluate and save an average of the weights")
    add("--model-ema-decay", type=FRACTION, default=0.99996, metavar="D", help="decay of that average")
    switch(group, "--model-ema-warmup", False, "let that decay grow from 0 in the first updates")


def add_data_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("data")).add_argument
    add(
        "--data-set",
        metavar="NAME",
        help="DIGITS CIFAR10 CIFAR100 IMNET FOLDER FLOWERS CARS PETS INAT INAT19 hfds/... wds/... "
        "(default: IMNET with --data-path, else DIGITS)",
    )
    add("--data-path", metavar="DIR", help="where the data set lies")
    switch(group, "--download", False, "fetch the data set where that is possible")
    add("--classes", type=class_list, metavar="A,B,...", help="only these classes, by name or number, in this order")
    add(
        "--inat-category",
        default="name",
        metavar="RANK",
        help="what INAT19 classifies: %(choices)s",
        choices=["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"],
    )
    add("--batch-size", type=POSITIVE, default=128, metavar="N", help="images a process and step")
    add(
        "--num-workers",
        type=COUNT,
        default=min(10, len(os.sched_getaffinity(0))),
        metavar="N",
        help="loader processes; 0: load in this one (default: 10, or the number of cores)",
    )
    switch(group, "--pin-mem", True, "page-locked batches, for faster copies to a GPU")
    switch(group, "--skip-bad-images", False, "train on without unreadable images, and count them")
    add(
        "--eval-crop-pct",
        type=number(float, 0, 1, above=True),
        default=0.875,
        metavar="P",
        help="evaluation: the part of the resized image's side that is kept",
    )


def add_augmentation_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("augmentation")).add_argument
    add("--color-jitter", type=AMOUNT, default=0.4, metavar="X", help="strength; RandAugment takes its place")
    add(
        "--aa",
        type=policy,
        default="rand-m9-mstd0.5-inc1",
        metavar="POLICY",
        help="timm's name of a RandAugment or AutoAugment policy, or none",
    )
    add("--train-interpolation", default="bicubic", choices=["bicubic", "bilinear", "random"], help="of the crops")
    add("--smoothing", type=FRACTION, default=0.1, metavar="E", help="label smoothing")
    add("--reprob", type=FRACTION, default=0.0, metavar="P", help="random erasing")
    add("--remode", default="pixel", choices=["const", "rand", "pixel"], help="what erased places hold")
    add("--recount", type=POSITIVE, default=1, metavar="N", help="erased boxes")
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
    add("--token-label-size", type=POSITIVE, metavar="N", help="side of the token grid (default: follows the model)")
    add(
        "--token-label-crop",
        default="right",
        choices=["right", "reference"],
        help="how a crop is cut from a map; reference: axes swapped, as released",
    )
    switch(group, "--ground-truth", False, "blend the true class into the teacher's class target")
    add("--dense-weight", type=AMOUNT, default=0.5, metavar="W", help="of the token loss")
    add("--cls-weight", type=AMOUNT, default=1.0, metavar="W", help="of the class loss")


def add_optimizer_flags(parser: Parser) -> None:
    add = parser.add_argument_group("optimiser").add_argument
    add("--opt", default="adamw", metavar="NAME", help="timm's name; fusedadamw, fusedlamb, ... need NVIDIA apex")
    add("--opt-eps", type=number(float, 0, above=True), default=1e-8, metavar="EPS", help="epsilon")
    add("--opt-betas", type=FRACTION, nargs=2, metavar=("B1", "B2"), help="betas (default: the optimiser's)")
    add("--momentum", type=FRACTION, default=0.9, metavar="M", help="of SGD and the like")
    add("--weight-decay", type=AMOUNT, default=0.05, metavar="W", help="of weights with two and more axes")
    add("--clip-grad", type=AMOUNT, default=1.0, metavar="NORM", help="clip the gradient at this norm; 0: do not")
    add("--accum-iter", type=POSITIVE, default=1, metavar="N", help="steps whose gradients make one update")


def add_schedule_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("schedule (stepped after each epoch)")).add_argument
    add("--epochs", type=POSITIVE, default=300, metavar="N", help="passes over the data")
    add("--lr", type=AMOUNT, default=5e-4, metavar="LR", help="peak, for 512 images an update")
    switch(group, "--unscale-lr", False, "take --lr as it is, not times images an update / 512")
    add("--sched", default="cosine", choices=["cosine", "tanh", "poly", "step"], help="shape")
    add("--warmup-epochs", type=COUNT, default=5, metavar="N", help="linear warm-up, counted in --epochs")
    add("--warmup-lr", type=AMOUNT, default=1e-6, metavar="LR", help="where it begins")
    add("--min-lr", type=AMOUNT, default=1e-5, metavar="LR", help="where the schedule ends")
    add("--cooldown-epochs", type=COUNT, default=0, metavar="N", help="epochs at --min-lr after --epochs")
    add("--decay-epochs", type=POSITIVE, default=30, metavar="N", help="step: epochs between two decays")
    add("--decay-rate", type=AMOUNT, default=0.1, metavar="R", help="step: factor; poly: power")


def add_finetune_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("fine-tuning")).add_argument
    add("--finetune", metavar="PATH", help="weights to begin with, resized to --input-size")
    add(
        "--finetune-mode",
        default="eval",
        choices=["eval", "train"],
        help="eval: without dropout, drop path and batch statistics, as the authors did",
    )
    add(
        "--classifier",
        default="auto",
        choices=["auto", "new"],
        help="keep the file's if the classes agree, or always begin with a new one",
    )
    add("--layer-decay", type=number(float, 0, 1, above=True), metavar="D", help="lr factor a layer towards the stem")
    add("--freeze-at", type=COUNT, default=0, metavar="N", help="do not train the first N layers (1: the stem)")
    switch(group, "--freeze-bn", False, "use batch norms' stored statistics, and do not update them")


def add_distillation_flags(parser: Parser) -> None:
    add = parser.add_argument_group("distillation").add_argument
    add("--distillation-type", default="none", choices=["none", "soft", "hard"], help="as in DeiT")
    add("--teacher-model", metavar="NAME", help="any model of timm's")
    add("--teacher-path", metavar="PATH", help="its weights")
    add("--distillation-alpha", type=FRACTION, default=0.5, metavar="A", help="weight of the teacher's part")
    add("--distillation-tau", type=number(float, 0, above=True), default=1.0, metavar="T", help="soft: temperature")


def add_machine_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("machine")).add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--amp",
        default="auto",
        choices=["auto", "bf16", "fp16", "none"],
        help="mixed precision; auto: on CUDA, bf16 where the GPU has it",
    )
    add("--dtype", default="float32", choices=["float32", "float64"], help="of the weights; float64 to compare runs")
    switch(group, "--compile", False, "torch.compile the model")
    switch(group, "--channels-last", False, "NHWC memory format")
    switch(group, "--grad-checkpointing", False, "recompute activations: less memory, more time")
    switch(group, "--sync-bn", False, "batch statistics over all processes (CUDA)")
    switch(group, "--find-unused-parameters", False, "for models that leave parameters without a gradient")


def parse_args(argv: Sequence[str] | None, defaults: Mapping[str, Any], description: str) -> argparse.Namespace:
    """Parse and check a main's command line (None: the process's own).

    Raises UserError, in one line, for anything unknown, malformed or contradictory.
    """
    argv = [dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser(defaults, description)
    path = parser.parse_args(argv).config
    config = {} if path is None else read_config(path, parser)
    parser.set_defaults(**config)
    parser.set_defaults(**implied_defaults(parser.parse_args(argv)) | config)
    args = parser.parse_args(argv)
    # Merged, so that one --model-kwargs changes one argument of a config's model and not all of them.
    model_kwargs = config.get("model_kwargs", {}) | args.model_kwargs
    args = argparse.Namespace(**vars(args) | {"model_kwargs": model_kwargs})
    validate(args)
    return args


def dashed(word: str) -> str:
    """``--batch_size=8`` -> ``--batch-size=8``: flags are accepted in both spellings."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if word.startswith("--") else word


def implied_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """The defaults that follow from other flags; what a config or the command line says beats them."""
    implied = dict(TOKEN_LABEL_DEFAULTS) if args.token_label else {}
    data_set = args.data_set or ("IMNET" if args.data_path else "DIGITS")
    run = f"{args.arch}-{data_set}".lower().replace("/", "-")
    return implied | {"data_set": data_set, "output_dir": f"runs/{run}"}


def read_config(path: str, parser: Parser) -> dict[str, Any]:
    """A YAML file's keys as attributes of the parsed arguments, each converted as its flag would be."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of 'flag: value'")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    config = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise UserError(f"--config {path}: unknown key {key!r}{suggestion(name, actions)}")
        try:
            config[name] = config_value(actions[name], value, parser)
        except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
            raise UserError(f"--config {path}: {key}: {getattr(error, 'message', error)}") from error
    return config


def config_value(action: argparse.Action, value: Any, parser: Parser) -> Any:
    """What the flag would make of ``value``; ArgumentError where it has another type or range."""
    if isinstance(action, argparse.BooleanOptionalAction):
        if not isinstance(value, bool):
            raise argparse.ArgumentError(action, f"{value!r} is not true or false")
        return value
    if isinstance(action, KeyValues):
        if not (isinstance(value, dict) and all(str(key).isidentifier() for key in value)):
            raise argparse.ArgumentError(action, f"{value!r} is not a mapping of names to values")
        return value
    if value is None and action.default is None:
        return None
    if action.nargs is not None:
        if not (isinstance(value, list) and len(value) == action.nargs):
            raise argparse.ArgumentError(action, f"{value!r} is not a list of {action.nargs}")
        return [scalar(action, item, parser) for item in value]
    return scalar(action, value, parser)


def scalar(action: argparse.Action, value: Any, parser: Parser) -> Any:
    """One YAML scalar through the flag's own type and choices (text has to do: YAML takes 5e-4 for text)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise argparse.ArgumentError(action, f"{value!r} is not a single value")
    if action.type is None and not isinstance(value, str):
        raise argparse.ArgumentError(action, f"{value!r} is not text")
    converted = parser._get_value(action, str(value))
    parser._check_value(action, converted)
    return converted


def validate(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything is read or written."""
    mixing = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    resumed = args.resume or args.finetune
    rules = [
        (args.token_label and mixing, "--token-label excludes --mixup and --cutmix: it mixes by MixToken"),
        (args.token_label and not args.token_label_data, "--token-label needs --token-label-data DIR"),
        (args.token_label_data and not args.token_label, "--token-label-data needs --token-label"),
        (args.token_label and args.distillation_type != "none", "--token-label excludes --distillation-type"),
        (
            mixing and args.batch_size % 2,
            f"mixup and cutmix pair images: --batch-size {args.batch_size} has to be even (or turn both off)",
        ),
        (
            args.cutmix_minmax and args.cutmix_minmax[0] >= args.cutmix_minmax[1],
            "--cutmix-minmax: MIN has to be below MAX",
        ),
        (args.opt_betas and max(args.opt_betas) >= 1, "--opt-betas have to be below 1"),
        (args.eval and not resumed, "--eval needs the weights to evaluate: --resume PATH or --finetune PATH"),
        (
            args.distillation_type != "none" and not (args.teacher_model and args.teacher_path),
            f"--distillation-type {args.distillation_type} needs --teacher-model NAME and --teacher-path PATH",
        ),
        (
            args.distillation_type == "none" and (args.teacher_model or args.teacher_path),
            "a teacher needs --distillation-type soft or hard",
        ),
        (args.dtype == "float64" and args.amp in ("bf16", "fp16"), "--dtype float64 excludes --amp"),
        (args.sync_bn and args.freeze_bn, "--sync-bn and --freeze-bn exclude each other"),
    ]
    for broken, message in rules:
        if broken:
            raise UserError(message)
