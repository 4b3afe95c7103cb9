"""Resuming: which checkpoint, whether it fits this run, what it contains, and how its state is restored."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
from timm.scheduler.plateau_lr import PlateauLRScheduler

from models.checkpoints import read_checkpoint, weights_of
from runtime.checkpoints import later_checkpoint, newest_intact
from runtime.processes import Distributed
from runtime.provenance import plain
from training.log import report
from training.model import load
from training.optimizer import images_per_update
from training.trainer import Progress, Trainer
from utils import UserError, one_line, quote

LAST = "checkpoint_last.pth"
# Options of torch's optimisers that depend on the machine: a run saved on a CPU resumes on CUDA.
MACHINE_OPTIONS = ("fused", "foreach", "capturable")
PLATEAU = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")  # the state of that schedule


# ---------------------------------------------------------------------------------------------- which checkpoint


def find_checkpoint(args: argparse.Namespace, dist: Distributed) -> dict[str, Any] | None:
    """The checkpoint that --resume names, or None.

    Raises:
        UserError: a run without it, or from it, would overwrite another run or later checkpoints of this one.
    """
    if args.resume is None:
        for name in ("log.txt", LAST):
            if not (args.eval or args.dry_run) and (Path(args.output_dir) / name).exists():
                raise UserError(
                    f"--output-dir {args.output_dir}: it has another run's {name}; continue that run with "
                    "--resume auto, or choose another directory"
                )
        return None
    directory = Path(args.output_dir if args.resume == "auto" else args.resume)
    found, path = None, args.resume
    if args.resume == "auto" or directory.is_dir():
        found = newest_intact(directory) if dist.is_main else None
        path = dist.broadcast_object(None if found is None else str(found[0]))
        if path is None and args.resume == "auto":
            return None
        if path is None:
            raise UserError(f"--resume {args.resume}: no checkpoint in this directory")
    state = read_checkpoint(path) if found is None else found[1]
    where = f", epoch {state['epoch']}, step {state.get('step', 0)}" if "epoch" in state else ""
    report(dist, f"{'evaluating' if args.eval else 'resuming from'} {path}{where}")
    if args.eval or args.dry_run or directory == Path(args.output_dir):  # what is later there is damaged
        return state
    later = later_checkpoint(args.output_dir, state)
    if later is not None:
        raise UserError(
            f"--resume {args.resume}: {later} is further in training and would be overwritten; choose another "
            "--output-dir, or continue from there with --resume auto"
        )
    return state


def with_global_batch(
    args: argparse.Namespace, state: Mapping[str, Any], dist: Distributed, multiple: int = 1
) -> argparse.Namespace:
    """The arguments with which this number of processes makes updates of as many images as the checkpoint's.

    Args:
        multiple: what a batch size has to be a multiple of.

    Raises:
        UserError: no batch size does, or the command line asks for another number of images.
    """
    require_keys(state, args.resume, "args", "world_size")
    batch, accumulated, processes = state["args"]["batch_size"], state["args"]["accum_iter"], state["world_size"]
    images = batch * accumulated * processes
    if images == images_per_update(args, dist):
        return args
    before = (
        f"{args.resume}: its updates were of {images} images, --batch-size {batch} x --accum-iter {accumulated} "
        f"x {processes} processes"
    )
    share, rest = divmod(images, dist.world_size)
    sizes = [size for size in range(multiple, args.batch_size + 1, multiple) if share % size == 0 and not rest]
    if not sizes or dist.world_size == processes:
        source = args.output_dir if args.resume == "auto" else args.resume
        raise UserError(
            f"{before}; {dist.world_size} processes of at most --batch-size {args.batch_size} make others; for another "
            f"number of images start a new run from its weights: --finetune {source}"
        )
    flags = {"batch_size": sizes[-1], "accum_iter": share // sizes[-1]}
    report(
        dist,
        f"{before}; continuing with --batch-size {flags['batch_size']} --accum-iter {flags['accum_iter']} "
        f"x {dist.world_size} processes",
    )
    return argparse.Namespace(**vars(args) | flags)


def require_keys(state: Mapping[str, Any], path: str, *keys: str) -> None:
    """Raise UserError for a file that lacks something a run needs to resume."""
    missing = [key for key in keys if state.get(key) is None]
    if missing:
        raise UserError(
            f"--resume {path}: no {', '.join(missing)} in it, so it is not a run's checkpoint; "
            "--finetune starts a new run from its weights"
        )


# ---------------------------------------------------------------------------------------- what a checkpoint contains


def checkpoint_state(trainer: Trainer) -> dict[str, Any]:
    """Everything to resume from, and everything that prediction needs."""
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
    """Attribute of `Progress` -> its key in a checkpoint, where "score" is the task's: best_score -> best_acc1."""
    return {item.name: item.name.replace("score", score) for item in fields(Progress)}


# ---------------------------------------------------------------------------------------------- restoring it


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Restore a checkpoint; raises UserError that names what differs."""
    path, task, progress, optimizer = trainer.args.resume, trainer.task, trainer.progress, trainer.optimizer
    stored = stored_names(task.ranked_by)
    # Older files do not say what reached the score.
    require_keys(state, path, "model", "optimizer", "args", "world_size", *(set(stored.values()) - {"averaged"}))
    check_same(state, task.identity(), path)
    check_same(state["args"], {name: getattr(trainer.args, name) for name in task.sample_flags}, path)
    if state["step"]:
        check_same(state["args"], {"seed": trainer.args.seed}, path)
    if state["args"].get("opt") != trainer.args.opt:
        raise UserError(f"--resume {path}: it was trained with --opt {state['args'].get('opt')}")
    if ("model_ema" in state) != (trainer.ema is not None):
        flag = "--model-ema" if "model_ema" in state else "--no-model-ema"
        raise UserError(f"--resume {path}: it was trained with {flag}")
    try:
        trainer.model.load_state_dict(state["model"])
        if trainer.ema is not None:
            trainer.ema.module.load_state_dict(state["model_ema"])
        groups = [
            saved | {name: own[name] for name in MACHINE_OPTIONS if name in own}
            for saved, own in zip(state["optimizer"]["param_groups"], optimizer.param_groups, strict=True)
        ]
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        trainer.scaler.load_state_dict(state.get("scaler", {}))
    except (RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"--resume {path}: {one_line(error)}") from error
    for name, key in stored.items():
        setattr(progress, name, state.get(key, getattr(progress, name)))
    progress.step = progress.step // state["args"]["accum_iter"] * trainer.args.accum_iter
    if progress.step > len(task.train):
        raise UserError(
            f"--resume {path}: its step {progress.step} is beyond an epoch's {len(task.train)}; "
            "was it trained on another data set?"
        )
    if progress.epoch > 0:
        trainer.scheduler.step(progress.epoch - 1)
    if isinstance(trainer.scheduler, PlateauLRScheduler):
        vars(trainer.scheduler.lr_scheduler).update(state.get("plateau", {}))


def load_average(trainer: Trainer, state: dict[str, Any]) -> None:
    """Load the average to evaluate, if there is one; it may be of another image size."""
    if trainer.ema is not None:
        path = trainer.args.resume
        load(trainer.ema.module, weights_of(state, ema=True, path=path), path, new_head=False)


def check_same(state: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    """Raise UserError for the first setting in which a checkpoint and this run differ."""
    for key, value in wanted.items():
        found = state.get(key)
        if json.dumps(found, default=repr) == json.dumps(value):  # lists in a file are tuples on a command line
            continue
        if isinstance(found, dict) and isinstance(value, dict):
            names = [name for name in found | value if found.get(name) != value.get(name)]
            found, value = ({name: part[name] for name in names if name in part} for part in (found, value))
        found, value = (part if isinstance(part, str) else quote(part) for part in (found, value))
        raise UserError(f"--resume {path}: its {key} is {found}, this run's is {value}")
