"""Resuming: find the checkpoint, check that it fits this run, save and restore its state."""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler
from torch import nn

from models.checkpoints import read_checkpoint, weights_of
from models.loading import classifier_names
from models.pretrained import LAST
from runtime.checkpoints import newest_first, newest_intact
from runtime.processes import Distributed
from runtime.provenance import plain
from training.model import load
from training.optimizer import images_per_update
from training.trainer import Progress, Run, Trainer
from utils import UserError, one_line

REQUIRED = ("model", "optimizer", "args", "world_size", "epoch", "step", "meters")  # keys needed to resume
PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # the state of that schedule


def find_checkpoint(args: argparse.Namespace, dist: Distributed) -> dict[str, Any] | None:
    """The checkpoint that --resume names, or None.

    Raises:
        UserError: it is not a run's checkpoint, or this run would overwrite another run or later checkpoints.
    """
    output, writes = Path(args.output_dir), not (args.eval or args.dry_run)
    if args.resume is None:
        found = [name for name in ("log.txt", LAST) if writes and (output / name).exists()]
        if found:
            raise UserError(f"--output-dir {output}: has another run's {found[0]}; --resume auto continues that run")
        return None
    path = source = output if args.resume == "auto" else Path(args.resume)
    state = None
    if args.resume == "auto" or source.is_dir():
        path, state = newest_intact(source) if dist.is_main else (None, None)
        path = dist.gather_objects(path)[0]
        if path is None and args.resume == "auto" and not args.eval:
            return None
        if path is None:
            raise UserError(f"--resume {args.resume}: no checkpoint in this directory")
    state = state or read_checkpoint(path)
    where = f", epoch {state['epoch']}, step {state.get('step', 0)}" if "epoch" in state else ""
    dist.say(f"{'evaluating' if args.eval else 'resuming from'} {path}{where}")
    if args.eval:
        return state
    if missing := [key for key in REQUIRED if state.get(key) is None]:
        raise UserError(
            f"--resume {path}: not a run's checkpoint, {', '.join(missing)} missing; "
            "--finetune starts a new run from its weights"
        )
    if writes and source != output:  # in the same directory, later checkpoints are damaged
        newest = newest_first(output)[:1]
        if newest and newest[0][0] > (state["epoch"], state["step"]):
            raise UserError(
                f"--resume {args.resume}: {newest[0][-1]} is further in training and would be overwritten; choose "
                "another --output-dir, or continue from there with --resume auto"
            )
    return state


def with_global_batch(args: argparse.Namespace, state: Mapping[str, Any], dist: Distributed) -> argparse.Namespace:
    """Adapt batch size and accumulation so that another number of processes keeps the checkpoint's images per update.

    The batch size does not increase, and an even one stays even, as mixup needs.

    Raises:
        UserError: no batch size keeps it, or the command line asks for another number of images.
    """
    batch, accumulated, processes = state["args"]["batch_size"], state["args"]["accum_iter"], state["world_size"]
    images = batch * accumulated * processes
    if images == images_per_update(args, dist):
        return args
    before = (
        f"{args.resume}: its updates have {images} images, --batch-size {batch} x --accum-iter {accumulated} "
        f"x {processes} processes"
    )
    share, rest = divmod(images, dist.world_size)
    odd = args.batch_size % 2
    sizes = [size for size in range(args.batch_size, 0, -1) if share % size == 0 and (odd or size % 2 == 0)]
    if rest or not sizes or dist.world_size == processes:
        raise UserError(
            f"{before}; {dist.world_size} processes with --batch-size {args.batch_size} or less cannot keep it; "
            f"--finetune {args.output_dir if args.resume == 'auto' else args.resume} starts a new run from its weights"
        )
    new = {"batch_size": sizes[0], "accum_iter": share // sizes[0]}
    now = f"--batch-size {new['batch_size']} --accum-iter {new['accum_iter']} x {dist.world_size} processes"
    dist.say(f"{before}; continuing with {now}")
    return argparse.Namespace(**vars(args) | new)


def checkpoint_state(trainer: Trainer) -> dict[str, Any]:
    """The content of a checkpoint: everything needed to resume and to predict."""
    task = trainer.task
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    if trainer.ema is not None:
        state["model_ema"] = trainer.ema.module.state_dict()
    if isinstance(trainer.scheduler, PlateauLRScheduler):
        plateau = trainer.scheduler.lr_scheduler
        state["plateau"] = {name: getattr(plateau, name) for name in PLATEAU}
    if trainer.scaler.is_enabled():
        state["scaler"] = trainer.scaler.state_dict()
    state |= task.identity()
    state |= {key: getattr(trainer.progress, name) for name, key in stored_names(task.ranked_by).items()}
    state |= task.record()
    return state | {
        "args": plain(vars(trainer.args)),
        "world_size": trainer.dist.world_size,
        "version": {"torch": str(torch.__version__), "timm": timm.__version__},
    }


def stored_names(score: str) -> dict[str, str]:
    """Map attributes of `Progress` to keys of a checkpoint, which contain the score's name: best_score -> best_acc1."""
    return {item.name: item.name.replace("score", score) for item in fields(Progress)}


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore a checkpoint; with --eval, only its EMA weights. Raises UserError that names a setting that differs."""
    path, task, progress = trainer.args.resume, trainer.task, trainer.progress
    if trainer.args.eval:  # the image size may differ
        if trainer.ema is not None:
            load(trainer.ema.module, weights_of(state, ema=True, path=path), path, new_head=False)
        return
    check_same(state, task.identity(), path)
    flags = [*task.sample_flags, "opt", "model_ema", *(["seed"] if state["step"] else [])]
    check_same(state["args"], {name: getattr(trainer.args, name) for name in flags}, path)
    try:
        trainer.model.load_state_dict(state["model"])
        if trainer.ema is not None:
            trainer.ema.module.load_state_dict(state["model_ema"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state.get("scaler", {}))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"--resume {path}: {one_line(error)}") from error
    for name, key in stored_names(task.ranked_by).items():
        setattr(progress, name, state.get(key, getattr(progress, name)))
    progress.step = progress.step // state["args"]["accum_iter"] * trainer.args.accum_iter
    if progress.epoch > 0:
        trainer.scheduler.step(progress.epoch - 1)
    if isinstance(trainer.scheduler, PlateauLRScheduler):
        vars(trainer.scheduler.lr_scheduler).update(state.get("plateau", {}))


def load_initial(run: Run, model: nn.Module, class_names: tuple[str, ...]) -> None:
    """Load the initial weights of a model, from --finetune or, with --eval, from --resume.

    The classifier is loaded too if its classes match, unless --classifier is "new".

    Raises:
        UserError: the weights do not fit the model or, with --eval, the classes.
    """
    args, resumed = run.args, run.checkpoint is not None
    model.to(run.precision.dtype)  # before loading, so that float64 weights keep their precision
    path = args.resume if resumed else args.finetune
    if path is None or (resumed and not args.eval):  # `restore` loads the weights of a run that resumes
        return
    state = run.checkpoint if resumed else read_checkpoint(path)
    weights = weights_of(state, ema=False if resumed else None, path=path)
    if state.get("class_names"):
        same = tuple(state["class_names"]) == class_names
    else:  # compare the numbers of classes
        same = len(weights.get(f"{classifier_names(model)[0]}.weight", ())) == len(class_names)
    if args.eval and not same:
        raise UserError(f"--eval: the classes of {path} differ from those of this data")
    new = load(model, weights, path, new_head=not (args.eval or (same and args.classifier == "auto")))
    if not resumed:
        run.dist.say(f"loaded {path}; not from it: {', '.join(new) or 'nothing'}")


def check_same(state: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    """Raise UserError for the first setting that differs between a checkpoint and this run."""
    for key, value in wanted.items():
        found, value = plain(state.get(key)), plain(value)  # lists in the file are tuples in parsed arguments
        if found != value:
            raise UserError(f"--resume {path}: its {key} is {found!s:.200}, this run's is {value!s:.200}")
