"""The parts of a run: its resources, its progress, and everything that a training step needs."""

import argparse
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from runtime.processes import Distributed
from runtime.run_directory import RunDirectory
from training.model import freeze_layers
from training.optimizer import build_optimizer, build_scheduler
from training.precision import Precision
from training.task import Task
from utils import StopSignals, UserError


@dataclass(frozen=True)
class Run:
    """The resources of a run."""

    args: argparse.Namespace
    dist: Distributed
    precision: Precision
    directory: RunDirectory | None  # only on the main process, without --eval and --dry-run
    checkpoint: dict[str, Any] | None  # the checkpoint to resume from


@dataclass
class Progress:
    """The progress of a run, saved in every checkpoint."""

    epoch: int = 0
    step: int = 0  # finished micro-steps in the epoch
    updates: int = 0  # of the weights, in all epochs
    # Sums over those micro-steps: updates, overflows, loss, norm, seconds, wait_seconds.
    meters: dict[str, float] = field(default_factory=dict)
    score: float = 0.0  # of the last finished epoch
    best_score: float = 0.0
    best_epoch: int = -1
    averaged: bool = False  # whether the average of the weights (EMA) reached `score`

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.meters[name] = self.meters.get(name, 0.0) + amount

    def end_epoch(self, score: float, averaged: bool) -> None:
        if self.best_epoch < 0 or score > self.best_score:
            self.best_score, self.best_epoch = score, self.epoch
        self.score, self.averaged = score, averaged
        self.epoch, self.step, self.meters = self.epoch + 1, 0, {}


class Trainer:
    """Everything that a training step needs. `parallel` is `model` wrapped for several processes."""

    def __init__(self, run: Run, task: Task, stop: StopSignals):
        args = run.args
        self.args, self.dist, self.precision = args, run.dist, run.precision
        self.directory, self.checkpoint = run.directory, run.checkpoint
        self.task, self.stop, self.progress = task, stop, Progress()
        self.epochs = args.epochs + args.cooldown_epochs
        self.updates_per_epoch = len(task.train) // args.accum_iter
        layout = torch.channels_last if args.channels_last else torch.preserve_format
        self.model: nn.Module = task.model.to(run.dist.device, run.precision.dtype, memory_format=layout)
        freeze_layers(self.model, args.freeze_at)
        if args.grad_checkpointing:
            try:
                self.model.set_grad_checkpointing(True)
            except (AttributeError, AssertionError) as error:
                raise UserError(f"--grad-checkpointing: {args.arch} does not support it") from error
        self.ema: ModelEmaV3 | None = None
        if args.model_ema or (args.eval and run.checkpoint is not None and run.checkpoint.get("model_ema")):
            self.ema = ModelEmaV3(self.model, args.model_ema_decay, use_warmup=args.model_ema_warmup)
        self.optimizer = build_optimizer(args, self.model, run.dist)
        self.scheduler = build_scheduler(args, self.optimizer, self.updates_per_epoch)
        if args.compile:
            for model in (self.model, *(() if self.ema is None else (self.ema.module,))):
                model.compile(mode=None if args.compile_mode == "default" else args.compile_mode)
        self.parallel = run.dist.wrap(self.model, args.sync_bn, args.find_unused_parameters)
        self.scaler = torch.amp.GradScaler(run.dist.device.type, enabled=run.precision.amp is torch.float16)

    @property
    def lr(self) -> float:
        """The learning rate of the layers that --layer-decay leaves unchanged."""
        return max(group["lr"] for group in self.optimizer.param_groups)


def set_mode(task: Task, model: nn.Module, args: argparse.Namespace) -> None:
    """Set training mode, as modified by --finetune-mode, --freeze-bn and --freeze-at."""
    evaluating = args.finetune is not None and args.finetune_mode == "eval"
    model.train(not evaluating)
    task.set_mode(model)
    for module in model.modules():
        frozen = all(not weight.requires_grad for weight in module.parameters())
        if isinstance(module, _BatchNorm) and (args.freeze_bn or frozen):
            module.eval()
