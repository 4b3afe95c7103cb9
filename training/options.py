"""The command line of the main scripts: flags of every run, defaults from YAML, implied values, and checks.

Values come, in rising precedence, from the defaults here, the recipe or --config, and the command line. Implied values
take the precedence of the flag that implied them.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import models
from models.checkpoints import CheckpointError, check_model_kwargs, peek
from models.pretrained import find_checkpoint
from runtime.provenance import plain
from training.arguments import (
    ABOVE_ZERO,
    AMOUNT,
    COUNT,
    FRACTION,
    POSITIVE,
    WORKERS,
    FlagTable,
    KeyValues,
    Parser,
    image_size,
    integers,
    number,
    python_module,
    read_config,
    text,
)
from utils import UserError, say

ROOT = Path(__file__).resolve().parent.parent
ARCH, INPUT_SIZE = "spectformer_xs", (224, 224)
MOST_WORKERS = 16
OWN_FOLDERS = ("IMNET", "FOLDER", "COCO")  # data sets that are folders of the user's own
COMPILE_MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
SCHEDULES = ["cosine", "tanh", "poly", "step", "multistep", "constant", "wsd", "plateau"]
ACTIONS = ("config", "resume", "eval", "dry_run", "print_config")  # what --print-config leaves out
# Model arguments that choose the mixers.
MIXER_CHOICES = ("alpha", "spectral_depths", "spectral_stages", "mixer", "mixing", "mixers")
Settings = dict[str, Any]
# (whether the arguments are invalid, the error message; "{lr}" stands for the value of --lr)
Checks = Iterable[tuple[Callable[[argparse.Namespace], Any], str]]


@dataclass(frozen=True)
class TaskFlags:
    """The flags that a task adds to those of every run."""

    table: FlagTable
    implied: Callable[[Mapping[str, Any]], Settings]  # the values that the given flags imply for other flags
    derived: Callable[[Mapping[str, Any]], Settings]  # defaults that depend on all settings; one is the data set
    checks: Checks  # invalid combinations


def available_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """The cores per process that torchrun started here, at most MOST_WORKERS; Slurm's tasks do not share cores."""
    return min(MOST_WORKERS, max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


RUN = {
    "the run": [
        ("--config", text, None, "YAML", "YAML file of flags; the command line overrides it"),
        ("--output-dir", text, None, "DIR", "run directory (default: runs/<arch>-<data>)"),
        ("--resume", text, None, "PATH|auto", "checkpoint or run directory; auto: --output-dir if it has one"),
        ("--eval", bool, False, None, "evaluate the weights of --resume or --finetune, and exit"),
        ("--dry-run", bool, False, None, "run one update and one evaluation batch, write nothing, and exit"),
        ("--print-config", bool, False, None, "print all settings as YAML for --config, and exit"),
        ("--wandb", text, None, "PROJECT", "also log to this Weights & Biases project (needs the wandb package)"),
        ("--seed", COUNT, 0, "N", "random seed"),
        ("--print-freq", POSITIVE, 50, "N", "updates between progress lines, when there is no terminal"),
        ("--checkpoint-steps", COUNT, 0, "N", "also save a checkpoint every N updates; 0: only after epochs"),
        ("--checkpoint-epochs", COUNT, 100, "N", "keep a numbered checkpoint every N epochs; 0: never"),
        ("--keep-best", POSITIVE, 1, "K", "number of best checkpoints to keep"),
    ],
    "model": [
        ("--arch", text, None, "NAME", f"model of this project or of timm (default: --finetune's, or {ARCH})"),
        ("--model-kwargs", KeyValues, {}, "KEY=VALUE", "arguments of the model's constructor: depth=4 embed_dim=64"),
        ("--mixers", text, None, "LIST", "mixer of each block: spectral*4,attention*8; slashes separate stages"),
        ("--mixer-module", python_module, None, "FILE.py", "Python file that adds its own mixers to MIXERS"),
        ("--input-size", image_size, None, "PIXELS", "image side or HEIGHTxWIDTH (default: --finetune's, or 224)"),
        ("--drop", FRACTION, 0.0, "P", "dropout rate before the classifier"),
        ("--drop-path", FRACTION, None, "P", "stochastic depth rate (default: the model's own)"),
        ("--model-ema", bool, False, None, "also keep, evaluate and save a moving average (EMA) of the weights"),
        ("--model-ema-decay", FRACTION, 0.99996, "D", "decay of the EMA"),
        ("--model-ema-warmup", bool, False, None, "increase the EMA's decay from 0 over the first updates"),
    ],
    "loading": [
        ("--batch-size", POSITIVE, 128, "N", "images per process and step"),
        ("--num-workers", WORKERS, None, "N", "loader processes; 0: none (default: cores per process, at most 16)"),
        ("--pin-mem", bool, True, None, "pin memory for faster copies to a GPU (default: on)"),
        ("--skip-bad-images", bool, False, None, "skip unreadable images and count them"),
    ],
}
TRAINING = {
    "optimizer": [
        ("--opt", text, "adamw", "NAME", "optimizer, by timm's name; fusedadamw, fusedlamb, ... need NVIDIA apex"),
        ("--opt-eps", ABOVE_ZERO, 1e-8, "EPS", "epsilon of the optimizer"),
        ("--opt-betas", (FRACTION, 2), None, ("B1", "B2"), "betas of the optimizer (default: its own)"),
        ("--momentum", FRACTION, 0.9, "M", "momentum of SGD and similar optimizers"),
        ("--weight-decay", AMOUNT, 0.05, "W", "weight decay, for weights with at least two dimensions"),
        ("--clip-grad", AMOUNT, 1.0, "NORM", "maximum norm of the gradient; 0: no clipping"),
        ("--accum-iter", POSITIVE, 1, "N", "gradient accumulation: steps per update"),
    ],
    "schedule": [
        ("--epochs", number(int, 1, 10**6), 300, "N", "number of epochs"),
        ("--early-stop", COUNT, 0, "N", "stop after N epochs without improvement; 0: never"),
        ("--lr", AMOUNT, 5e-4, "LR", "peak learning rate, for 512 images per update"),
        ("--unscale-lr", bool, False, None, "do not scale --lr with images per update / 512"),
        ("--lr-scale", ["linear", "sqrt"], "linear", None, "how --lr scales with images per update / 512"),
        ("--sched", SCHEDULES, "cosine", None, "learning rate schedule, by timm's name"),
        ("--sched-on-updates", bool, False, None, "step the schedule after each update instead of each epoch"),
        ("--warmup-epochs", COUNT, 5, "N", "epochs of linear warm-up, included in --epochs"),
        ("--warmup-updates", COUNT, 0, "N", "updates of warm-up instead of --warmup-epochs, with --sched-on-updates"),
        ("--warmup-part", FRACTION, None, "P", "warm-up as a fraction of --epochs, instead of --warmup-epochs"),
        ("--warmup-lr", AMOUNT, None, "LR", "initial learning rate (default: 1e-6, at most a tenth of the peak)"),
        ("--min-lr", AMOUNT, None, "LR", "final learning rate (default: 1e-5, at most a tenth of the peak)"),
        ("--cooldown-epochs", COUNT, 0, "N", "epochs at --min-lr after --epochs"),
        ("--decay-epochs", POSITIVE, None, "N", "step: between decays (default: 30); wsd: decay (default: epochs / 5)"),
        ("--decay-milestones", integers, (30, 60), "N,N,...", "multistep: epochs at which to decay (default: 30,60)"),
        ("--decay-rate", AMOUNT, 0.1, "R", "step, multistep, plateau: decay factor; poly: power"),
        ("--patience-epochs", COUNT, 10, "N", "plateau: epochs without improvement before a decay"),
    ],
    "fine-tuning": [
        ("--finetune", text, None, "PATH", "initial weights: checkpoint, run directory, or bundled model's name"),
        ("--finetune-mode", ["eval", "train"], "eval", None, "eval: disable dropout, drop path and batch statistics"),
        ("--classifier", ["auto", "new"], "auto", None, "auto: keep the checkpoint's classifier if its classes match"),
        ("--layer-decay", number(float, 0, 1, above=True), None, "D", "lr factor per layer, from head to stem"),
        ("--freeze-at", COUNT, 0, "N", "freeze the first N layers (1: the stem)"),
        ("--freeze-bn", bool, False, None, "use the stored batch norm statistics and do not update them"),
    ],
    "machine": [
        ("--device", text, "auto", None, "auto, cpu, cuda or cuda:N"),
        ("--amp", ["auto", "bf16", "fp16", "none"], "auto", None, "mixed precision; auto: bf16 or fp16 on GPUs only"),
        ("--dtype", ["float32", "float64"], "float32", None, "dtype of the weights; float64 is for comparing runs"),
        ("--compile", bool, False, None, "use torch.compile; recommended on CUDA"),
        ("--compile-mode", COMPILE_MODES, "default", "MODE", "mode of torch.compile: %(choices)s"),
        ("--profile", COUNT, 0, "N", "write a torch.profiler trace of N updates to the run directory; 0: none"),
        ("--channels-last", bool, False, None, "use the channels_last (NHWC) memory format"),
        ("--grad-checkpointing", bool, False, None, "recompute activations in the backward pass: less memory, slower"),
        ("--sync-bn", bool, False, None, "synchronize batch norm statistics across processes (CUDA only)"),
        ("--find-unused-parameters", bool, False, None, "support models that leave parameters without a gradient"),
    ],
}
CHECKS: Checks = [
    (lambda a: a.opt_betas and max(a.opt_betas) >= 1, "--opt-betas must be below 1"),
    (lambda a: a.eval and bool(a.resume) == bool(a.finetune), "--eval needs either --resume PATH or --finetune PATH"),
    (lambda a: a.dtype == "float64" and a.amp in ("bf16", "fp16"), "--dtype float64 excludes --amp"),
    (lambda a: a.eval and a.dry_run, "--eval and --dry-run exclude each other"),
    (lambda a: a.compile_mode != "default" and not a.compile, "--compile-mode needs --compile"),
    (lambda a: a.sync_bn and a.freeze_bn, "--sync-bn and --freeze-bn exclude each other"),
    (lambda a: a.warmup_updates and not a.sched_on_updates, "--warmup-updates needs --sched-on-updates"),
    (lambda a: a.model_kwargs.get("in_chans", 3) != 3, "--model-kwargs in_chans: use --in-chans"),
]


def build_parser(flags: TaskFlags, recipes: Sequence[str] = (), description: str | None = None) -> Parser:
    """Build the parser of a task's main scripts."""
    parser = Parser(description, usage="%(prog)s [flags]")
    for table in (RUN, flags.table, TRAINING):
        parser.add_flags(table)
    parser.set_defaults(num_workers=default_workers())
    if recipes:
        chosen = "; without --lr, by those of ".join(recipes)
        parser.epilog = f"Without --config, the defaults above are replaced by the values of {chosen}."
    return parser


def parse_args(
    flags: TaskFlags, argv: Sequence[str] | None, recipes: Sequence[str] = (), description: str | None = None
) -> argparse.Namespace:
    """Parse and check the command line of a main script, by default `sys.argv[1:]`.

    Args:
        recipes: the YAML file to use without --config, relative to the project root, and another one without --lr.
        description: the first text of --help.

    Raises:
        UserError: an argument is unknown or malformed, or two arguments contradict each other.
        CheckpointError: --finetune's file is unreadable, or model arguments would make timm read other files.
    """
    words = sys.argv[1:] if argv is None else argv
    # torch.distributed.launch without --use_env adds --local-rank; LOCAL_RANK has the same value.
    words = [word for word in words if not word.startswith(("--local-rank=", "--local_rank="))]
    parser = build_parser(flags, recipes, description)
    on_line = parser.given(words)
    run_directory = Path(resume) if (resume := on_line.get("resume")) and Path(resume).is_dir() else None
    config = on_line.pop("config", None)
    if config is None and run_directory and (run_directory / "args.yaml").exists():
        config = run_directory / "args.yaml"
    if config is None and recipes:
        config = recipes[0 if "lr" in on_line else -1]
        in_config = read_config(ROOT / config, parser)
    else:
        in_config = {} if config is None else read_config(config, parser)

    args = {name: action.default for name, action in parser.settings().items()}
    args |= flags.implied(in_config) | in_config | flags.implied(on_line) | on_line
    args |= {"config": None if config is None else str(config), "mixers": None}
    args["model_kwargs"] = merged_model_kwargs(in_config, on_line)
    check_model_kwargs(args["model_kwargs"], "--model-kwargs")
    if args["finetune"] is not None:
        args |= finetuned_model(args)
    args |= {"arch": args["arch"] or ARCH, "input_size": args["input_size"] or INPUT_SIZE}
    args |= {name: value for name, value in flags.derived(args).items() if args.get(name) is None}
    run = f"{args['arch']}-{data_name(args['data_set'], args.get('data_path'))}".lower().replace("/", "-")
    args["output_dir"] = str(args["output_dir"] or run_directory or f"runs/{run}")

    namespace = argparse.Namespace(**args)
    for check, message in (*CHECKS, *flags.checks):
        if check(namespace):
            raise UserError(message.format(**args))
    if namespace.print_config:
        shown = {name: value for name, value in args.items() if name not in ACTIONS and value is not None}
        say(yaml.safe_dump(plain(shown), sort_keys=False, allow_unicode=True).rstrip())
        raise SystemExit(0)
    return namespace


def data_name(data_set: str, data_path: str | None) -> str:
    """The name of the data: the folder's name for a user's own folder, otherwise the data set's name."""
    return (data_path and data_set in OWN_FOLDERS and Path(data_path).resolve().name) or data_set


def finetuned_model(args: Settings) -> Settings:
    """Resolve --finetune's file, and take the model from it unless the settings name one."""
    path, state = args["finetune"], {}
    try:
        path = str(find_checkpoint(path))
        state = peek(path)
    except CheckpointError:
        if not args["resume"]:  # a run that resumes reads no weights from it
            raise
    model = {name: args[name] or state.get(name) for name in ("arch", "input_size")}
    model |= {"finetune": path, "model_kwargs": args["model_kwargs"]}
    if state.get("arch") and models.resolve_arch(model["arch"]) == models.resolve_arch(state["arch"]):
        # The run, not the checkpoint, decides whether there is a token-label head.
        kwargs = {name: value for name, value in (state.get("model_kwargs") or {}).items() if name != "token_label"}
        check_model_kwargs(kwargs, f"{path}: model_kwargs")
        model["model_kwargs"] = merged_model_kwargs({"model_kwargs": kwargs}, args)
    return model


def merged_model_kwargs(*layers: Settings) -> Settings:
    """Merge the --model-kwargs and --mixers of several settings, in rising precedence.

    A choice of mixers replaces every earlier choice of mixers.
    """
    merged: Settings = {}
    for layer in layers:
        own, mixers = layer.get("model_kwargs", {}), layer.get("mixers")
        if mixers and "mixers" in own:
            raise UserError("--mixers and --model-kwargs mixers=... exclude each other; remove one of them")
        own = own | ({"mixers": mixers} if mixers else {})
        replaced = MIXER_CHOICES if "mixers" in own else ("mixers",) if set(MIXER_CHOICES) & set(own) else ()
        merged = {name: value for name, value in merged.items() if name not in replaced} | own
    return merged
