"""The optimizer and its schedule."""

import argparse
import warnings

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.scheduler.scheduler import Scheduler
from torch import nn

from runtime.processes import Distributed
from utils import UserError, one_line

LR_BATCH = 512  # --lr is for this many images an update (DeiT)
MIN_LR, WARMUP_LR, DECAY_EPOCHS = 1e-5, 1e-6, 30  # DeiT's
SHORTEST_WARMUP = 2  # updates; a shorter --warmup-part counts as 0


def images_per_update(args: argparse.Namespace, dist: Distributed) -> int:
    return args.batch_size * args.accum_iter * dist.world_size


def peak_rate(args: argparse.Namespace, dist: Distributed) -> float:
    """Scale --lr to the number of images per update.

    --lr-scale chooses linear (Goyal et al. 2017) or square-root scaling (Malladi et al. 2022).
    """
    if args.unscale_lr:
        return args.lr
    ratio = images_per_update(args, dist) / LR_BATCH
    return args.lr * (ratio if args.lr_scale == "linear" else ratio**0.5)


def build_optimizer(args: argparse.Namespace, model: nn.Module, dist: Distributed) -> torch.optim.Optimizer:
    """Create timm's optimizer --opt for a model, with the learning rate `peak_rate`.

    Raises:
        UserError: the optimizer is not available, or it needs second derivatives.
    """
    options = optimizer_kwargs(args) | {"lr": peak_rate(args, dist)}
    if args.opt.lower() in ("adam", "adamw") and dist.device.type == "cuda":
        options["fused"] = True
    if "muon" in args.opt.lower():
        options["fallback_list"] = no_matrices(model)
    try:
        optimizer = create_optimizer_v2(model, **options)
        if getattr(optimizer, "is_second_order", False):
            raise ValueError("it needs second derivatives, which are not computed")
        return optimizer
    except (ImportError, TypeError, ValueError, AssertionError) as error:
        raise UserError(f"--opt {args.opt}: {one_line(error)}") from error


def no_matrices(model: nn.Module) -> list[str]:
    """The names of parameters that are not matrices of a linear map, such as filters: Muon's fallback trains them."""
    matrices = {
        id(layer.weight)
        for layer in model.modules()
        if isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)
    }
    return [name for name, weight in model.named_parameters() if id(weight) not in matrices]


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer, updates_per_epoch: int) -> Scheduler:
    """Create the schedule. Step it after each epoch and before each update except the first, with the previous number.

    --sched-on-updates decides which of the two calls has an effect. Epochs (updates) 0 and 1 run at --warmup-lr, as
    published.
    """
    peak = max(group["lr"] for group in optimizer.param_groups)
    warmup_epochs = args.warmup_epochs
    if args.warmup_updates:
        warmup_epochs = args.warmup_updates / updates_per_epoch
    elif args.warmup_part is not None:
        warmup_epochs = args.warmup_part * args.epochs
        if args.sched_on_updates and warmup_epochs * updates_per_epoch < SHORTEST_WARMUP:
            warmup_epochs = 0
    options = scheduler_kwargs(args) | {
        "min_lr": at_most_a_tenth(args.min_lr, MIN_LR, peak),
        "warmup_epochs": warmup_epochs,
        "warmup_lr": at_most_a_tenth(args.warmup_lr, WARMUP_LR, peak),
        "decay_epochs": args.decay_epochs or (None if args.sched == "wsd" else DECAY_EPOCHS),
    }
    try:
        with warnings.catch_warnings(action="ignore"):  # timm's plateau schedule warns that it is deprecated
            scheduler, _ = create_scheduler_v2(optimizer, updates_per_epoch=updates_per_epoch, **options)
    except (ValueError, AssertionError) as error:
        raise UserError(f"--sched {args.sched}: {one_line(error)}") from error
    return scheduler


def at_most_a_tenth(given: float | None, default: float, peak: float) -> float:
    """--min-lr or --warmup-lr as given, else the published default, but at most a tenth of the peak."""
    return min(default, peak / 10) if given is None else given
