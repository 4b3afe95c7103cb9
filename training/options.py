"""The flags of a run that every task has, and how they are settled.

From weakest to strongest: the parser's defaults (DeiT's vanilla recipe), a file of flags, the command line. A flag
that implies others implies them with the strength of the place where it stands.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import models
from models.checkpoints import READING_ARGUMENTS
from runtime.provenance import plain
from training.arguments import (
    AMOUNT,
    COUNT,
    FRACTION,
    POSITIVE,
    WORKERS,
    KeyValues,
    Parser,
    dashed,
    image_size,
    integers,
    number,
    read_config,
    switch,
)
from training.model import described_model
from utils import UserError, say

ROOT = Path(__file__).resolve().parent.parent
ARCH = "spectformer_xs"
ACTIONS = ("config", "resume", "eval", "dry_run", "print_config")  # what --print-config leaves out
MIXER_CHOICES = ("alpha", "spectral_depths", "mixer", "mixing", "mixers")  # arguments of models for the same choice
Settings = dict[str, Any]


@dataclass(frozen=True)
class TaskFlags:
    """The flags of a task beside those of every run.

    add: puts them into a parser. implied: what some that are given imply for others. derived: defaults that follow
    from all the settings, among them the name of the data set. check: raises UserError for those that contradict
    each other.
    """

    add: Callable[[Parser], None]
    implied: Callable[[Mapping[str, Any]], Settings]
    derived: Callable[[Mapping[str, Any]], Settings]
    check: Callable[[argparse.Namespace], None]


def parse_args(
    flags: TaskFlags, argv: Sequence[str] | None, recipe: str | None = None, description: str | None = None
) -> argparse.Namespace:
    """Parse and check a main's command line.

    Args:
        flags: those of the task.
        argv: the command line; None for the process's own.
        recipe: the file of flags, from the root of the project, that a command line without --config follows.
        description: what --help begins with.

    Raises:
        UserError: in one line, for anything unknown, malformed or contradictory.
    """
    argv = [dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    parser = build_parser(flags, recipe, description)
    on_line = with_mixers(parser.given(argv))
    run_directory = _run_directory(on_line.get("resume"))
    config = on_line.pop("config", None) or (run_directory and _kept_arguments(run_directory))
    config = config or (recipe and ROOT / recipe)
    in_config = {} if config is None else with_mixers(read_config(config, parser))
    settled = flags.implied(in_config) | in_config | flags.implied(on_line) | on_line
    args = {name: action.default for name, action in parser.settings().items()} | settled
    described = _described(args)
    args["arch"] = args["arch"] or described.get("arch", ARCH)
    args["model_kwargs"] = merged(in_config.get("model_kwargs", {}), on_line.get("model_kwargs", {}))
    if described and models.resolve_arch(args["arch"]) == models.resolve_arch(described["arch"]):
        args["model_kwargs"] = merged(described["model_kwargs"], args["model_kwargs"])
    args |= {name: value for name, value in flags.derived(args).items() if args[name] is None}
    if args["output_dir"] is None:
        run = f"{args['arch']}-{args['data_set']}".lower().replace("/", "-")
        args["output_dir"] = f"runs/{run}" if run_directory is None else str(run_directory)
    namespace = argparse.Namespace(**args)
    check(namespace)
    flags.check(namespace)
    if namespace.print_config:
        say(config_text(args))
        raise SystemExit(0)
    return namespace


def with_mixers(given: Settings) -> Settings:
    """Settings with --mixers as what it is short for, an argument of the model.

    Raises:
        UserError: it is given in both ways.
    """
    if (mixers := given.get("mixers")) is None:
        return given
    model_kwargs = given.get("model_kwargs", {})
    if "mixers" in model_kwargs:
        raise UserError("--mixers and --model-kwargs mixers=...: leave one of them out")
    return given | {"mixers": None, "model_kwargs": model_kwargs | {"mixers": mixers}}


def merged(weak: Settings, strong: Settings) -> Settings:
    """Arguments of a model from two places; the weaker's choice of mixers goes where the stronger has another one."""
    replaced = MIXER_CHOICES if "mixers" in strong else ("mixers",) if set(MIXER_CHOICES) & set(strong) else ()
    return {name: value for name, value in weak.items() if name not in replaced} | strong


def config_text(args: Settings) -> str:
    """All settings as a file for --config, but those that say what to do with them."""
    told = {name: value for name, value in args.items() if name not in ACTIONS and value is not None}
    return yaml.safe_dump(plain(told), sort_keys=False, allow_unicode=True).rstrip()


def _run_directory(resume: str | None) -> Path | None:
    """The directory that ``--resume RUNDIR`` names, if it does name one."""
    return Path(resume) if resume not in (None, "auto") and "\0" not in resume and os.path.isdir(resume) else None


def _kept_arguments(directory: Path) -> Path | None:
    path = directory / "args.yaml"
    return path if path.exists() else None


def _described(args: Settings) -> Settings:
    """What the checkpoint of --finetune says of its model; a run that goes on can do without that file."""
    if args["finetune"] is None or (args["resume"] and not os.path.exists(args["finetune"])):
        return {}
    return described_model(args["finetune"])


def build_parser(flags: TaskFlags, recipe: str | None = None, description: str | None = None) -> Parser:
    """The parser of a task's mains."""
    parser = Parser(description, usage="%(prog)s [flags]")
    add_run_flags(parser, recipe)
    add_model_flags(parser)
    add_loader_flags(parser)
    flags.add(parser)
    for add_group in (add_optimizer_flags, add_schedule_flags, add_finetune_flags, add_machine_flags):
        add_group(parser)
    return parser


def add_run_flags(parser: Parser, recipe: str | None) -> None:
    add = (group := parser.add_argument_group("the run")).add_argument
    default = f" (default: {recipe})" if recipe else ""
    add("--config", metavar="YAML", help=f"file of flags; the command line wins{default}")
    add("--output-dir", metavar="DIR", help="run directory (default: runs/<arch>-<data set>)")
    add(
        "--resume",
        metavar="PATH|auto",
        help="go on from a checkpoint; from a run directory's newest intact one, with the flags it "
        "was started with; auto: from --output-dir's, if there is one",
    )
    switch(group, "--eval", False, "evaluate the weights of --resume or --finetune, and stop")
    switch(group, "--dry-run", False, "build everything, try an update and a batch of evaluation, and write nothing")
    switch(group, "--print-config", False, "print all settings as a file for --config, and stop")
    add("--wandb", metavar="PROJECT", help="also log to this project of Weights & Biases, whose package it needs")
    add("--seed", type=COUNT, default=0, metavar="N", help="key of every random choice")
    add("--print-freq", type=POSITIVE, default=50, metavar="N", help="updates between two lines without a terminal")
    add("--checkpoint-steps", type=COUNT, default=0, metavar="N", help="also save every N updates; 0: epochs only")
    add("--checkpoint-epochs", type=COUNT, default=100, metavar="N", help="keep a checkpoint every N epochs; 0: none")
    add("--keep-best", type=POSITIVE, default=1, metavar="K", help="how many of the best checkpoints to keep")


def add_model_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("model")).add_argument
    add("--arch", metavar="NAME", help=f"ours, or any of timm's (default: --finetune's, or {ARCH})")
    add(
        "--model-kwargs",
        nargs="*",
        default={},
        action=KeyValues,
        metavar="KEY=VALUE",
        help="arguments of the model's constructor, as in depth=4 embed_dim=64",
    )
    add(
        "--mixers",
        metavar="LIST",
        help="what mixes tokens in each block: spectral*4,attention*8; a pyramid's stages are separated by slashes",
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


def add_loader_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("loading")).add_argument
    add("--batch-size", type=POSITIVE, default=128, metavar="N", help="images a process and step")
    add(
        "--num-workers",
        type=WORKERS,
        default=min(10, available_cores()),
        metavar="N",
        help="loader processes; 0: load in this one (default: 10, or the number of cores)",
    )
    switch(group, "--pin-mem", True, "page-locked batches, for faster copies to a GPU")
    switch(group, "--skip-bad-images", False, "leave out unreadable images, and count them")


def available_cores() -> int:
    """The cores that this process may use, where the system tells (Linux), else those there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    add = (group := parser.add_argument_group("schedule")).add_argument
    add("--epochs", type=number(int, 1, 10**6), default=300, metavar="N", help="passes over the data")
    add("--lr", type=AMOUNT, default=5e-4, metavar="LR", help="peak, for 512 images an update")
    switch(group, "--unscale-lr", False, "take --lr as it is, not times images an update / 512")
    add("--sched", default="cosine", choices=["cosine", "tanh", "poly", "step", "multistep"], help="shape")
    switch(group, "--sched-on-updates", False, "step it after each update, not after each epoch")
    add("--warmup-epochs", type=COUNT, default=5, metavar="N", help="linear warm-up, counted in --epochs")
    add("--warmup-updates", type=COUNT, default=0, metavar="N", help="instead, with --sched-on-updates")
    add("--warmup-lr", type=AMOUNT, default=1e-6, metavar="LR", help="where it begins")
    add("--min-lr", type=AMOUNT, default=1e-5, metavar="LR", help="where the schedule ends")
    add("--cooldown-epochs", type=COUNT, default=0, metavar="N", help="epochs at --min-lr after --epochs")
    add("--decay-epochs", type=POSITIVE, default=30, metavar="N", help="step: epochs between two decays")
    add(
        "--decay-milestones",
        type=integers,
        default=(30, 60),
        metavar="N,N,...",
        help="multistep: epochs after which it decays (default: 30,60)",
    )
    add("--decay-rate", type=AMOUNT, default=0.1, metavar="R", help="step, multistep: factor; poly: power")


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


def add_machine_flags(parser: Parser) -> None:
    add = (group := parser.add_argument_group("machine")).add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--amp",
        default="auto",
        choices=["auto", "bf16", "fp16", "none"],
        help="mixed precision; auto: on CUDA, bf16 where the GPU has it",
    )
    add(
        "--dtype",
        default="float32",
        choices=["float32", "float64"],
        help="of the weights; float64 to compare runs",
    )
    switch(group, "--compile", False, "torch.compile the model")
    switch(group, "--channels-last", False, "NHWC memory format")
    switch(group, "--grad-checkpointing", False, "recompute activations: less memory, more time")
    switch(group, "--sync-bn", False, "batch statistics over all processes (CUDA)")
    switch(group, "--find-unused-parameters", False, "for models that leave parameters without a gradient")


def check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, before anything is read or written."""
    refuse(
        (args.opt_betas and max(args.opt_betas) >= 1, "--opt-betas have to be below 1"),
        (
            args.eval and not (args.resume or args.finetune),
            "--eval needs the weights to evaluate: --resume PATH or --finetune PATH",
        ),
        (
            args.eval and args.resume and args.finetune,
            "--eval evaluates the weights of --resume or those of --finetune, not both",
        ),
        (args.dtype == "float64" and args.amp in ("bf16", "fp16"), "--dtype float64 excludes --amp"),
        (args.eval and args.dry_run, "--eval and --dry-run exclude each other"),
        (args.sync_bn and args.freeze_bn, "--sync-bn and --freeze-bn exclude each other"),
        (args.warmup_updates and not args.sched_on_updates, "--warmup-updates needs --sched-on-updates"),
        (args.model_kwargs.get("in_chans", 3) != 3, "--model-kwargs in_chans: images have 3 channels"),
        (
            reading := sorted(READING_ARGUMENTS.intersection(args.model_kwargs)),
            f"--model-kwargs: {''.join(reading[:1])} would make timm read other files; leave it out",
        ),
    )


def refuse(*rules: tuple[Any, str]) -> None:
    """Raise UserError with the message of the first rule, (broken, message), that is broken."""
    for broken, message in rules:
        if broken:
            raise UserError(message)
