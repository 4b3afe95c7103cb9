"""Going on from a checkpoint: which one, whether it fits, what it holds, and what is taken over from it."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from models.checkpoints import read_checkpoint, weights_of
from runtime.checkpoints import later_checkpoint, newest_intact
from runtime.processes import Distributed
from runtime.provenance import plain
from training.log import report
from training.model import load
from training.optimizer import build_optimizer, images_per_update
from training.trainer import METERS, Progress, Trainer
from utils import UserError, one_line, quote

LAST = "checkpoint_last.pth"
MOST_IMAGES = 2**24  # that an update can be of


# ------------------------------------------------------------------------------------------------- which checkpoint


def find_checkpoint(args: argparse.Namespace, dist: Distributed) -> dict[str, Any] | None:
    """The checkpoint that --resume names; UserError if, without one, another run would be overwritten."""
    if args.resume is not None and (args.resume == "auto" or Path(args.resume).is_dir()):
        directory = args.output_dir if args.resume == "auto" else args.resume
        found = newest_intact(directory) if dist.is_main else None
        path = dist.broadcast_object(None if found is None else str(found[0]))
        if path is None:
            if args.resume == "auto":
                return None
            raise UserError(f"--resume {args.resume}: no checkpoint in this directory")
        report(dist, f"resuming from {path}")
        state = found[1] if found is not None else read_checkpoint(path)
        return state if Path(directory) == Path(args.output_dir) else without_loss(args, state)
    if args.resume is not None:
        return without_loss(args, read_checkpoint(args.resume))
    for name in ("log.txt", LAST):
        if not args.eval and (Path(args.output_dir) / name).exists():
            raise UserError(
                f"--output-dir {args.output_dir}: it has another run's {name}; continue that run with "
                "--resume auto, or choose another directory"
            )
    return None


def without_loss(args: argparse.Namespace, state: dict[str, Any]) -> dict[str, Any]:
    """`state`; UserError if a run that resumes from it would overwrite later checkpoints of --output-dir."""
    later = None if args.eval or args.dry_run else later_checkpoint(args.output_dir, state)
    if later is not None:
        raise UserError(
            f"--resume {args.resume}: {later} is further in training and would be overwritten; choose another "
            "--output-dir, or continue from there with --resume auto"
        )
    return state


def with_global_batch(
    args: argparse.Namespace, state: Mapping[str, Any], dist: Distributed, multiple: int = 1
) -> argparse.Namespace:
    """The arguments with which this number of processes makes the checkpoint's updates, of as many images.

    `multiple`: what a batch size has to be a multiple of.

    Raises:
        UserError: no batch size does, or the command line asks for another number of images.
    """
    require_keys(state, args.resume, "args", "world_size")
    saved = state["args"]
    factors = {
        "batch_size": saved.get("batch_size"),
        "accum_iter": saved.get("accum_iter"),
        "world_size": state["world_size"],
    }
    for name, value in factors.items():
        if not isinstance(value, int) or not 1 <= value <= MOST_IMAGES:
            raise UserError(f"--resume {args.resume}: its {name} is {value!r}")
    images = saved["batch_size"] * saved["accum_iter"] * state["world_size"]
    if images > MOST_IMAGES:
        raise UserError(f"--resume {args.resume}: its updates are of {images} images")
    if images == images_per_update(args, dist):
        return args
    made = (
        f"{args.resume}: its updates were of {images} images, --batch-size {saved['batch_size']} x "
        f"--accum-iter {saved['accum_iter']} x {state['world_size']} processes"
    )
    if images % dist.world_size:
        fitting = ", ".join(str(n) for n in range(1, images + 1) if images % n == 0 and n <= 64)
        raise UserError(f"{made}; {dist.world_size} processes cannot make them; these numbers can: {fitting}")
    share = images // dist.world_size
    sizes = [size for size in range(multiple, args.batch_size + 1, multiple) if share % size == 0]
    if not sizes or dist.world_size == state["world_size"]:
        fitting = "; ".join(f"--batch-size {b} --accum-iter {share // b}" for b in fitting_sizes(share, multiple))
        raise UserError(f"{made}; with {dist.world_size} these go on with it: {fitting or 'none'}")
    report(
        dist,
        f"{made}; going on with --batch-size {sizes[-1]} --accum-iter {share // sizes[-1]} "
        f"x {dist.world_size} processes",
    )
    return argparse.Namespace(**vars(args) | {"batch_size": sizes[-1], "accum_iter": share // sizes[-1]})


def fitting_sizes(share: int, multiple: int) -> list[int]:
    """The largest batch sizes, at most four, of which a whole number makes `share` images."""
    return [size for size in range(share, 0, -1) if share % size == 0 and size % multiple == 0][:4]


def require_keys(state: Mapping[str, Any], path: str, *keys: str) -> None:
    """Raise UserError for a file that has not all a run goes on from."""
    missing = [key for key in keys if state.get(key) is None]
    if missing:
        raise UserError(
            f"--resume {path}: no {', '.join(missing)} in it, so it is not a run's checkpoint; "
            "--finetune begins a new run from its weights"
        )


# ---------------------------------------------------------------------------------------------- what a checkpoint holds


def checkpoint_state(trainer: Trainer) -> dict[str, Any]:
    """Everything to go on from, and everything that prediction needs to know."""
    task = trainer.task
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    if trainer.ema is not None:
        state["model_ema"] = trainer.ema.module.state_dict()
    if trainer.scaler.is_enabled():
        state["scaler"] = trainer.scaler.state_dict()
    return (
        state
        | task.identity()
        | {key: getattr(trainer.progress, name) for name, key in stored_names(task.ranked_by).items()}
        | task.record()
        | {
            "args": plain(vars(trainer.args)),
            "world_size": trainer.dist.world_size,
            "version": {"torch": str(torch.__version__), "timm": timm.__version__},
        }
    )


def stored_names(score: str) -> dict[str, str]:
    """Attribute of `Progress` -> its name in a checkpoint, where scores are called by what they are."""
    return {item.name: item.name.replace("score", score) for item in fields(Progress)}


# ------------------------------------------------------------------------------------------------------ taking it over


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Take over a checkpoint; raises UserError that names what differs."""
    path, task, progress = trainer.args.resume, trainer.task, trainer.progress
    stored = stored_names(task.ranked_by)
    # Files of the time before it was noted do not say what reached the score.
    require_keys(state, path, "model", "optimizer", "args", "world_size", *(set(stored.values()) - {"averaged"}))
    check_same(state, task.identity(), path)
    check_progress(state, stored, path)
    check_same(state["args"], task.sample_settings(), path)
    if state["step"]:
        check_same(state["args"], {"seed": trainer.args.seed}, path)
    if state["args"].get("opt") != trainer.args.opt:
        raise UserError(f"--resume {path}: go on as it was trained, with --opt {state['args'].get('opt')}")
    if ("model_ema" in state) != (trainer.ema is not None):
        flag = "--model-ema" if "model_ema" in state else "--no-model-ema"
        raise UserError(f"--resume {path}: go on as it was trained, with {flag}")
    try:
        trainer.model.load_state_dict(state["model"])
        if trainer.ema is not None:
            trainer.ema.module.load_state_dict(state["model_ema"])
        trainer.optimizer.load_state_dict(state["optimizer"])
        trainer.scaler.load_state_dict(state.get("scaler", {}))
        check_optimizer_state(trainer)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {path}: {one_line(error)}") from error
    for name, key in stored.items():
        setattr(progress, name, state.get(key, getattr(progress, name)))
    progress.step = progress.step // state["args"]["accum_iter"] * trainer.args.accum_iter
    if progress.step > len(task.train):
        raise UserError(
            f"--resume {path}: its step {progress.step} is beyond an epoch's {len(task.train)}; "
            "is it of another data set?"
        )
    if progress.epoch > 0:
        trainer.scheduler.step(progress.epoch - 1)


def load_average(trainer: Trainer, state: dict[str, Any]) -> None:
    """Give the average that is to be evaluated, if one is, its weights, which may be of another image size."""
    if trainer.ema is not None:
        path = trainer.args.resume
        load(trainer.ema.module, weights_of(state, ema=True, path=path), path, new_head=False)


def check_same(state: Mapping[str, Any], wanted: Mapping[str, Any], path: str) -> None:
    """Raise UserError for the first setting in which a checkpoint and this run differ."""
    for key, value in wanted.items():
        found = state.get(key)
        if json.dumps(found, default=repr) != json.dumps(value):  # a config's lists are a command line's tuples
            raise UserError(f"--resume {path}: its {key} is {difference(found, value)}")


def difference(found: Any, wanted: Any) -> str:
    """Two values that differ, in words: texts as they are, of mappings the entries that differ."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [name for name in found | wanted if found.get(name) != wanted.get(name)]
        found, wanted = ({name: value[name] for name in names if name in value} for value in (found, wanted))
    told, other = (value if isinstance(value, str) and len(value) < 100 else quote(value) for value in (found, wanted))
    return f"{told}, this run's is {other}"


def check_progress(state: Mapping[str, Any], stored: Mapping[str, str], path: str) -> None:
    """Raise UserError unless a checkpoint says where it stands as `Progress` does."""
    for name, default in asdict(Progress()).items():
        value = state.get(stored[name], default)
        wanted = (int, float) if isinstance(default, float) else type(default)
        if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, wanted):
            raise UserError(f"--resume {path}: its {stored[name]} is {quote(value)}")
    meters = state["meters"]
    if state["step"] and meters.keys() != set(METERS):
        raise UserError(f"--resume {path}: its meters are {quote(list(meters))}, not {list(METERS)}")
    for name, value in meters.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"--resume {path}: its {name} is {quote(value)}")


def check_optimizer_state(trainer: Trainer) -> None:
    """Raise ValueError for a loaded state that is not as the optimiser makes it.

    torch takes any, and stumbles over it at the next update.
    """
    fresh = build_optimizer(trainer.args, trainer.model, trainer.dist)
    for group, own in zip(trainer.optimizer.param_groups, fresh.param_groups, strict=True):
        for name, value in own.items():
            kind = (int, float) if isinstance(value, (int, float)) else (tuple, list)
            if isinstance(value, (int, float, tuple)) and not isinstance(group.get(name), kind):
                raise ValueError(f"its optimizer has {group.get(name)!r} for {name}")
        made: dict[torch.Size, dict[str, Any]] = {}  # of this group: Muon treats weights of the same shape unlike
        for weight in group["params"]:
            state = trainer.optimizer.state.get(weight)
            if state:
                if weight.shape not in made:
                    made[weight.shape] = state_after_a_step(trainer, own, weight)
                if (found := shapes(state)) != made[weight.shape]:
                    raise ValueError(f"its optimizer holds {found} for a weight, not {made[weight.shape]}")


def state_after_a_step(trainer: Trainer, group: Mapping[str, Any], weight: Tensor) -> dict[str, Any]:
    """`shapes` of the state that the optimiser keeps for a weight like this one of its group."""
    trial = nn.Parameter(torch.zeros_like(weight))
    trial.grad = torch.zeros_like(weight)
    alone = argparse.Namespace(**vars(trainer.args) | {"layer_decay": None})
    optimizer = build_optimizer(alone, [{**group, "params": [trial]}], trainer.dist)
    optimizer.step()
    return shapes(optimizer.state[trial])


def shapes(state: dict[str, Any]) -> dict[str, Any]:
    """What each entry of a weight's optimiser state is: a tensor's shape, or a type."""
    return {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for name, value in state.items()
    }
