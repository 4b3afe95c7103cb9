"""Training and evaluation. ``fit`` is a run from its first epoch to its last, to be read top to bottom."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.models import get_pretrained_cfg, group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_info
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from tqdm import tqdm

import checkpointing
import models
from datasets import Batch, Data, EvalLoader
from losses import build_loss
from models.checkpoints import WeightMismatch, classifier_names, load_weights, unwrap
from models.pyramid import sample_mix_box
from rundir import RunDirectory
from token_labels import token_label_size
from utils import (
    Distributed,
    Interrupted,
    NonFiniteError,
    StopSignals,
    UserError,
    init_distributed,
    one_line,
    seed_step,
    seeded,
)

LR_BATCH = 512  # --lr is for this many images an update (DeiT)
SMALLEST_SCALE = 2.0**-14  # of the fp16 loss; where even this overflows the gradient is not just large
LAST = "checkpoint_last.pth"
METERS = ("updates", "overflows", "loss", "norm", "seconds")  # sums over the steps of an epoch
NAMED_FILES = 32  # sample files that an error message lists
APEX = "build NVIDIA apex from its source, https://github.com/NVIDIA/apex (PyPI's package apex is unrelated)"


@dataclass(frozen=True)
class Run:
    """What `start` opens.

    args: the command line, settled; dist: the job's processes; directory: where the run writes, None with
    --eval; checkpoint: what it goes on from, None for a beginning.
    """

    args: argparse.Namespace
    dist: Distributed
    directory: RunDirectory | None
    checkpoint: dict[str, Any] | None


@dataclass(frozen=True)
class Precision:
    """The dtype of weights and images, and that of autocast (None: off)."""

    device: torch.device
    dtype: torch.dtype
    amp: torch.dtype | None

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)


@dataclass
class Progress:
    """Where a run stands; all of it goes through checkpoints.

    `step` micro-steps of `epoch` are done and `meters` hold the sums over them, of all processes. `updates`
    counts those of the weights since the beginning. `acc1` is the last finished epoch's.
    """

    epoch: int = 0
    step: int = 0
    updates: int = 0
    meters: dict[str, float] = field(default_factory=dict)
    acc1: float = 0.0
    best_acc1: float = 0.0
    best_epoch: int = -1

    def add(self, **amounts: float) -> None:
        for name, amount in amounts.items():
            self.meters[name] = self.meters.get(name, 0.0) + amount

    def end_epoch(self, acc1: float) -> None:
        if self.best_epoch < 0 or acc1 > self.best_acc1:
            self.best_acc1, self.best_epoch = acc1, self.epoch
        self.acc1, self.epoch, self.step, self.meters = acc1, self.epoch + 1, 0, {}


@dataclass(frozen=True)
class Trainer:
    """What a step needs. `parallel` is `model` as wrapped for several processes."""

    args: argparse.Namespace
    dist: Distributed
    data: Data
    model: nn.Module
    parallel: nn.Module
    ema: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    scheduler: Scheduler
    criterion: nn.Module
    mixup: Mixup | None
    precision: Precision
    progress: Progress
    stop: StopSignals

    @property
    def lr(self) -> float:
        """The learning rate of the layers that --layer-decay does not lower."""
        return max(group["lr"] for group in self.optimizer.param_groups)


# --------------------------------------------------------------------------------------------------- a run


@contextmanager
def start(args: argparse.Namespace) -> Iterator[Run]:
    """Join the job's processes, hold the run directory, find the checkpoint to go on from.

    Raises:
        UserError: a flag does not fit the machine, the checkpoint not the number of processes, or the
            directory holds another run. Nothing was written then.
    """
    dist = init_distributed(args.device)
    check_machine(args, dist)
    with nullcontext() if args.eval else RunDirectory(args.output_dir, dist) as directory:
        checkpoint = find_checkpoint(args, dist)
        if checkpoint is not None and directory is not None:
            args = with_global_batch(args, checkpoint, dist)
        yield Run(args, dist, directory, checkpoint)


def fit(run: Run, model: nn.Module, data: Data) -> None:
    """Train to the last epoch, from the run's checkpoint if it has one; with --eval, evaluate and return.

    Raises:
        Interrupted: a process got a stop signal; everything was saved.
        NonFiniteError: a loss or gradient was NaN or infinite; it changed no weight on any process.
        UserError: the checkpoint or a flag does not fit the model.
    """
    with StopSignals() as stop:
        trainer = build_trainer(run, model, data, stop)
        if run.directory is None:
            report(trainer.dist, json.dumps(evaluate_all(trainer)))
        else:
            train(trainer, run)


def train(trainer: Trainer, run: Run) -> None:
    """`fit`, when everything is built."""
    args, progress = trainer.args, trainer.progress
    if run.checkpoint is not None:
        restore(trainer, run.checkpoint)
    run.directory.write_args(args, sys.argv)
    run.directory.truncate_log(progress.epoch)
    describe(trainer)
    if progress.epoch > 0 and progress.step == 0:
        save_epoch(trainer, run.directory)  # a crash may have come between the files of an epoch's end

    while progress.epoch < args.epochs + args.cooldown_epochs:
        try:
            train_one_epoch(trainer, run.directory)
            results = evaluate_all(trainer)
        except Interrupted:
            run.directory.save_checkpoint(LAST, checkpoint_state(trainer))
            report(trainer.dist, f"saved {args.output_dir}/{LAST}")
            raise
        row = log_row(trainer, results)
        progress.end_epoch(results.get("acc1_ema", results["acc1"]))
        trainer.scheduler.step(progress.epoch - 1)
        # In this order a crash in between repeats the epoch and writes the same again: nothing comes twice.
        run.directory.log_row(row)
        save_epoch(trainer, run.directory)
    farewell(trainer)


def save_epoch(trainer: Trainer, directory: RunDirectory) -> None:
    """Write the checkpoints of the end of an epoch; to do so twice is the same as once."""
    args, progress = trainer.args, trainer.progress
    state = checkpoint_state(trainer)
    directory.keep_best(state, progress.acc1, args.keep_best)
    if args.checkpoint_epochs and progress.epoch % args.checkpoint_epochs == 0:
        directory.save_checkpoint(f"checkpoint_{progress.epoch:04d}.pth", state)
    directory.save_checkpoint(LAST, state)


def train_one_epoch(trainer: Trainer, directory: RunDirectory) -> None:
    """Train from `progress.step` to the end of `progress.epoch`; raises Interrupted between two updates."""
    args, progress, dist = trainer.args, trainer.progress, trainer.dist
    set_mode(trainer.model, args)
    loss, batches, began = 0.0, [], time.perf_counter()
    micro_batches = enumerate(trainer.data.train.epoch(progress.epoch, progress.step), progress.step)

    with Display(trainer) as display:
        for step, batch in micro_batches:
            last_of_update = (step + 1) % args.accum_iter == 0
            with nullcontext() if last_of_update else without_gradient_sync(trainer.parallel):
                micro_loss = step_loss(trainer, batch, progress.epoch, step) / args.accum_iter
                trainer.scaler.scale(micro_loss).backward()
            loss = loss + micro_loss.detach()
            batches.append(batch)
            if not last_of_update:
                continue

            mean_loss, norm, stopping = update(trainer, loss, batches, step)
            now = time.perf_counter()
            overflow = not math.isfinite(norm)
            progress.step = step + 1
            progress.add(
                updates=1, overflows=overflow, loss=mean_loss, norm=0.0 if overflow else norm, seconds=now - began
            )
            loss, batches, began = 0.0, [], now
            display.show(mean_loss)
            if stopping:
                raise Interrupted(dist.max(trainer.stop.signum or 0))
            if args.checkpoint_steps and progress.step // args.accum_iter % args.checkpoint_steps == 0:
                directory.save_checkpoint(LAST, checkpoint_state(trainer))


def step_loss(trainer: Trainer, batch: Batch, epoch: int, step: int) -> Tensor:
    """Forward one micro-batch; every random choice is keyed on (seed, epoch, step)."""
    args = trainer.args
    images = as_input(batch.images, trainer.precision, args.channels_last)
    targets, box = batch.targets, {}
    with seeded(args.seed, "batch", epoch, step):
        if trainer.mixup is not None:
            images, targets = trainer.mixup(images, targets)
        if args.token_label:
            corners = sample_mix_box(trainer.model.token_label_size)
            # A compiled model takes them as data; as numbers it would be compiled anew for every box.
            box = {"box": torch.tensor(corners, device=images.device) if args.compile else corners}
    # Processes drop different paths, but mix by the same ratio and box.
    seed_step(args.seed, epoch, step, trainer.dist.rank)
    with trainer.precision.autocast():
        return trainer.criterion(images, trainer.parallel(images, **box), targets)


def update(trainer: Trainer, loss: Tensor, batches: list[Batch], step: int) -> tuple[float, float, bool]:
    """Update the weights by the gradients that `batches` left.

    Returns the loss over all processes, the gradient's norm before clipping, and whether any process was
    signalled. An fp16 gradient that overflowed (its norm is not finite) changes no weight, only the scale.

    Raises:
        NonFiniteError: on every process, for a loss or gradient (fp16's overflows apart) that is not finite.
    """
    args, dist, scaler = trainer.args, trainer.dist, trainer.scaler
    scaler.unscale_(trainer.optimizer)
    weights = [weight for weight in trainer.model.parameters() if weight.grad is not None]
    norm = get_total_norm([weight.grad for weight in weights])  # of averaged gradients: the same everywhere
    signalled = loss.new_full((), float(trainer.stop.signum or 0))
    shared = dist.sum(torch.stack([loss, signalled]).double())
    # The one place where an update waits for the device.
    total, signals, norm_value = torch.cat([shared, norm.double()[None]]).tolist()
    mean_loss = total / dist.world_size

    overflow = not math.isfinite(norm_value)
    if not math.isfinite(mean_loss):
        raise non_finite(trainer, f"the loss is {mean_loss}", batches, step)
    if overflow and not (scaler.is_enabled() and scaler.get_scale() > SMALLEST_SCALE):
        raise non_finite(trainer, f"the gradient's norm is {norm_value}", batches, step)
    if args.clip_grad:
        clip_grads_with_norm_(weights, args.clip_grad, norm)
    scaler.step(trainer.optimizer)
    scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    if not overflow:
        trainer.progress.updates += 1
        if trainer.ema is not None:
            trainer.ema.update(trainer.model, trainer.progress.updates if args.model_ema_warmup else None)
    return mean_loss, norm_value, signals > 0


def non_finite(trainer: Trainer, what: str, batches: list[Batch], step: int) -> NonFiniteError:
    """The error that names the epoch, the step and the samples of the update, of all processes.

    Where only some samples have non-finite logits, by themselves, it names those.
    """
    found = [finite_logits(trainer, batch) for batch in batches]
    found = [sample for process in trainer.dist.gather_objects(sum(found, [])) for sample in process]
    named = [index for index, finite in found if not finite] or [index for index, _ in found]
    files = [trainer.data.train.dataset.path(index) for index in named[:NAMED_FILES]]
    more = f" and {len(named) - len(files)} more" if len(named) > len(files) else ""
    where = f"epoch {trainer.progress.epoch}, step {step}, lr {trainer.lr:.6g}"
    return NonFiniteError(f"{where}: {what}; no weight was changed. Samples: {', '.join(files)}{more}")


@torch.no_grad()
def finite_logits(trainer: Trainer, batch: Batch) -> list[tuple[int, bool]]:
    """Each sample's index, and whether its own logits are finite."""
    trainer.model.eval()
    images = as_input(batch.images, trainer.precision, trainer.args.channels_last)
    finite = trainer.model(images).isfinite().all(dim=1)
    return list(zip(batch.indices.tolist(), finite.tolist(), strict=True))


def evaluate_all(trainer: Trainer) -> dict[str, float]:
    """`evaluate` the model, and its average under names ending in ``_ema``."""
    evaluated = {"": trainer.model} | ({"_ema": trainer.ema.module} if trainer.ema is not None else {})
    results = {}
    for suffix, model in evaluated.items():
        share_buffers(model, trainer.dist)
        found = evaluate(model, trainer.data.val, trainer.dist, trainer.precision, trainer.stop)
        results |= {name + suffix: value for name, value in found.items()}
    return results


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: EvalLoader, dist: Distributed, precision: Precision, stop: StopSignals | None = None
) -> dict[str, float]:
    """Evaluate every image of all processes' loaders once.

    Returns:
        loss: mean cross-entropy; acc1, acc5: per cent; correct1, correct5, images: counts.

    Raises:
        Interrupted: between two batches, on every process, when one of them was signalled.
    """
    model.eval()
    batches = iter(loader)
    totals = torch.zeros(4, dtype=torch.float64, device=dist.device)
    for _ in range(loader.rounds):
        if stop is not None and (signum := dist.max(stop.signum or 0)):
            raise Interrupted(signum)
        batch = next(batches, None)
        if batch is not None:
            with precision.autocast():
                logits = model(as_input(batch.images, precision))
            totals += count(logits.to(precision.dtype), batch.targets)
    loss, correct1, correct5, images = dist.sum(totals).tolist()
    return {
        "loss": loss / images,
        "acc1": 100 * correct1 / images,
        "acc5": 100 * correct5 / images,
        "correct1": int(correct1),
        "correct5": int(correct5),
        "images": int(images),
    }


def count(logits: Tensor, targets: Tensor) -> Tensor:
    """(4,) float64: summed cross-entropy, right in the first 1, right in the first 5, images."""
    loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == targets[:, None]
    return torch.stack(
        [loss.double(), hits[:, :1].sum().double(), hits.sum().double(), loss.new_full((), len(targets)).double()]
    )


def share_buffers(model: nn.Module, dist: Distributed) -> None:
    """Give every process the main one's batch statistics, which it also saves."""
    if dist.world_size > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(dist.sum(buffer if dist.is_main else torch.zeros_like(buffer)))


def as_input(images: Tensor, precision: Precision, channels_last: bool = False) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return images.to(dtype=precision.dtype, memory_format=memory_format)


def set_mode(model: nn.Module, args: argparse.Namespace) -> None:
    """Training mode, or what --finetune-mode, --freeze-bn and --freeze-at make of it."""
    evaluating = args.finetune is not None and args.finetune_mode == "eval"
    model.train(not evaluating)
    if args.token_label:
        model.training = True  # of the root alone: it then returns what the token-label loss needs
    for module in model.modules():
        frozen = all(not weight.requires_grad for weight in module.parameters())
        if isinstance(module, _BatchNorm) and (args.freeze_bn or frozen):
            module.eval()


def without_gradient_sync(parallel: nn.Module):
    """DDP's `no_sync`, for the steps before an update's last."""
    return parallel.no_sync() if hasattr(parallel, "no_sync") else nullcontext()


# ----------------------------------------------------------------------------------------------- its parts


def create_model(
    arch: str, num_classes: int, input_size: tuple[int, int], model_kwargs: dict[str, Any], flag: str = "--arch"
) -> nn.Module:
    """Any registered model, ours or timm's, for images of `input_size` (height, width) in pixels.

    Raises:
        UserError: no such model, or it does not take these arguments.
    """
    name = models.resolve_arch(arch)
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=1)
        raise UserError(f"{flag} {arch}: no such model" + (f"; did you mean {close[0]}?" if close else ""))
    # timm's models of a fixed size are told it; the others take any, and most of them have no such argument.
    fixed = get_pretrained_cfg(name, allow_unregistered=False).fixed_input_size
    size = {"img_size": input_size} if fixed else {}
    try:
        return timm.create_model(name, num_classes=num_classes, **size | model_kwargs)
    except (TypeError, ValueError, AssertionError, AttributeError, RuntimeError) as error:
        raise UserError(f"{flag} {name} with {size | model_kwargs}: {one_line(error)}") from error


def build_model(run: Run, data: Data) -> nn.Module:
    """The model of --arch for the data's classes, with --finetune's weights, or with --eval --resume's."""
    args = run.args
    torch.manual_seed(args.seed)
    rates = {"drop_rate": args.drop, "drop_path_rate": args.drop_path}
    model = create_model(args.arch, data.num_classes, args.input_size, rates | full_model_kwargs(args))
    model.to(getattr(torch, args.dtype))  # before loading: float64 weights keep their digits
    if run.checkpoint is not None and args.eval:
        load(model, checkpointing.weights(run.checkpoint), args.resume, new_head=False)
    elif run.checkpoint is None and args.finetune is not None:
        load_finetuned(model, args, data, run.dist)
    return model


def full_model_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """--model-kwargs and the flags that change the model's weights."""
    return args.model_kwargs | ({"token_label": True} if args.token_label else {})


def load_finetuned(model: nn.Module, args: argparse.Namespace, data: Data, dist: Distributed) -> None:
    """Load --finetune; its classifier stays if it is wanted and for these very classes."""
    state = checkpointing.load(args.finetune)
    weights = unwrap(checkpointing.weights(state))
    classifier = weights.get(f"{classifier_names(model)[0]}.weight")
    same_number = classifier is not None and len(classifier) == data.num_classes
    same_names = tuple(state.get("class_names", data.class_names)) == tuple(data.class_names)
    keep = args.classifier == "auto" and same_number and same_names
    left = load(model, weights, args.finetune, new_head=not keep)
    report(dist, f"loaded {args.finetune}; not from it: {', '.join(left) or 'nothing'}")


def load(model: nn.Module, weights: dict[str, Tensor], path: str, new_head: bool) -> list[str]:
    """`load_weights`, whose complaints become the user's and name the file."""
    try:
        return load_weights(model, weights, new_head=new_head)
    except (WeightMismatch, ValueError, RuntimeError, IndexError) as error:  # of tensors with absurd shapes, too
        raise UserError(f"{path}: {one_line(error)}") from error


def build_trainer(run: Run, model: nn.Module, data: Data, stop: StopSignals) -> Trainer:
    """Everything around the model, on the device."""
    args, dist = run.args, run.dist
    precision = choose_precision(args, dist.device)
    layout = torch.channels_last if args.channels_last else torch.preserve_format
    model.to(dist.device, precision.dtype, memory_format=layout)
    freeze_layers(model, args.freeze_at)
    if args.grad_checkpointing:
        enable_checkpointing(model)
    ema = None
    if args.model_ema:
        ema = ModelEmaV3(model, args.model_ema_decay, use_warmup=args.model_ema_warmup)
    optimizer = build_optimizer(args, model, dist)
    if args.compile:
        model.compile()
    return Trainer(
        args=args,
        dist=dist,
        data=data,
        model=model,
        ema=ema,
        optimizer=optimizer,
        precision=precision,
        parallel=dist.wrap(model, sync_bn=args.sync_bn, find_unused=args.find_unused_parameters),
        scaler=torch.amp.GradScaler(dist.device.type, enabled=precision.amp is torch.float16),
        scheduler=build_scheduler(args, optimizer),
        criterion=build_criterion(args, model, data, dist, precision),
        mixup=build_mixup(args, data),
        progress=Progress(),
        stop=stop,
    )


def check_machine(args: argparse.Namespace, dist: Distributed) -> None:
    """Refuse flags that the device cannot follow; on CUDA allow TF32 and cuDNN's search for algorithms."""
    if args.sync_bn and dist.device.type != "cuda":
        raise UserError("--sync-bn needs CUDA; on a CPU, --freeze-bn trains alike on any number of processes")
    if dist.device.type == "cuda" and args.dtype == "float32":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def choose_precision(args: argparse.Namespace, device: torch.device) -> Precision:
    dtype = getattr(torch, args.dtype)
    amp = args.amp
    if amp == "auto":
        on_gpu = device.type == "cuda" and dtype is torch.float32
        amp = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if on_gpu else "none"
    return Precision(device, dtype, {"bf16": torch.bfloat16, "fp16": torch.float16, "none": None}[amp])


def layers_of(model: nn.Module) -> dict[int, list[str]]:
    """Parameter names by layer, from the stem (0) to the head, as the model's `group_matcher` says."""
    if not hasattr(model, "group_matcher"):
        raise UserError("--freeze-at and --layer-decay: this model does not say what its layers are")
    return group_parameters(model, model.group_matcher(coarse=False))


def freeze_layers(model: nn.Module, number: int) -> None:
    """Take the first `number` layers out of training."""
    if number == 0:
        return
    layers = layers_of(model)
    if number >= len(layers):
        raise UserError(f"--freeze-at {number}: the model has {len(layers)} layers, one has to be trained")
    frozen = {name for layer in sorted(layers)[:number] for name in layers[layer]}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)


def enable_checkpointing(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(f"--grad-checkpointing: this model has none ({one_line(error)})") from error


def global_batch(args: argparse.Namespace, dist: Distributed) -> int:
    """Images an update of the weights."""
    return args.batch_size * args.accum_iter * dist.world_size


def build_optimizer(
    args: argparse.Namespace, model: nn.Module | list[nn.Parameter], dist: Distributed
) -> torch.optim.Optimizer:
    """Timm's optimiser of that name for a model or some weights; lr scaled linearly with the images an update
    (Goyal et al. 2017).
    """
    options = {"eps": args.opt_eps}
    if args.opt_betas is not None:
        options["betas"] = tuple(args.opt_betas)
    if args.opt.lower() in ("adam", "adamw") and dist.device.type == "cuda":
        options["fused"] = True
    if args.layer_decay is not None:
        layers_of(model)
    check_optimizer(args.opt)
    scale = 1.0 if args.unscale_lr else global_batch(args, dist) / LR_BATCH
    return create_optimizer_v2(
        model,
        opt=args.opt,
        lr=args.lr * scale,
        weight_decay=args.weight_decay,
        momentum=args.momentum,
        layer_decay=args.layer_decay,
        **options,
    )


def check_optimizer(name: str) -> None:
    """Raise UserError for an optimiser that timm does not know, or whose package is not installed."""
    try:
        implementation = get_optimizer_info(name.lower().split("_")[-1]).opt_class
    except ValueError as error:
        raise UserError(f"--opt {name}: timm knows no such optimiser") from error
    if not isinstance(implementation, str):
        return
    package = implementation.split(".")[0]
    how = APEX if package == "apex" else f"install {package}"
    try:
        __import__(implementation.rpartition(".")[0])
    except ImportError as error:
        raise UserError(f"--opt {name} needs {package}: {how}") from error
    if not torch.cuda.is_available():
        raise UserError(f"--opt {name} needs a CUDA device")


def build_scheduler(args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> Scheduler:
    """To be stepped after each epoch with its number; so epochs 0 and 1 run at --warmup-lr, as published."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        min_lr=args.min_lr,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        decay_epochs=args.decay_epochs,
        decay_rate=args.decay_rate,
    )
    return scheduler


def build_mixup(args: argparse.Namespace, data: Data) -> Mixup | None:
    if not mixes(args):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=data.num_classes,
    )


def build_criterion(
    args: argparse.Namespace, model: nn.Module, data: Data, dist: Distributed, precision: Precision
) -> nn.Module:
    """The loss, called as ``criterion(images, outputs, targets)``."""
    teacher = None
    if args.distillation_type != "none":
        path, flag = args.teacher_path, "--teacher-model"
        teacher = create_model(args.teacher_model, data.num_classes, args.input_size, {}, flag)
        load(teacher, checkpointing.weights(checkpointing.load(path)), path, new_head=False)
    loss = build_loss(
        num_classes=data.num_classes,
        smoothing=args.smoothing,
        soft_targets=mixes(args),
        token_size=token_label_size(model, args.token_label_size) if args.token_label else None,
        swapped=args.token_label_crop == "reference",
        cls_weight=args.cls_weight,
        dense_weight=args.dense_weight,
        ground_truth=args.ground_truth,
        teacher=teacher,
        distillation=args.distillation_type,
        alpha=args.distillation_alpha,
        tau=args.distillation_tau,
    )
    return loss.to(dist.device, precision.dtype)


def mixes(args: argparse.Namespace) -> bool:
    """Whether mixup or cutmix make distributions of the targets."""
    return bool(args.mixup or args.cutmix or args.cutmix_minmax)


# --------------------------------------------------------------------------------------------- checkpoints


def find_checkpoint(args: argparse.Namespace, dist: Distributed) -> dict[str, Any] | None:
    """The checkpoint that --resume names; UserError if, without one, another run would be overwritten."""
    if args.resume == "auto":
        found = checkpointing.newest_valid(args.output_dir) if dist.is_main else None
        path = dist.broadcast_object(None if found is None else str(found[0]))
        if path is None:
            return None
        report(dist, f"going on from {path}")
        return found[1] if found is not None else checkpointing.load(path)
    if args.resume is not None:
        return checkpointing.load(args.resume)
    for name in ("log.txt", LAST):
        if not args.eval and (Path(args.output_dir) / name).exists():
            raise UserError(
                f"--output-dir {args.output_dir} holds another run's {name}: go on with it by "
                "--resume auto, or name another directory"
            )
    return None


def with_global_batch(args: argparse.Namespace, state: dict[str, Any], dist: Distributed) -> argparse.Namespace:
    """The arguments with which this number of processes makes the checkpoint's updates, of as many images.

    Raises:
        UserError: no batch size does, or the command line asks for another number of images.
    """
    need(state, args.resume, "args", "world_size")
    saved = state["args"]
    factors = {
        "batch_size": saved.get("batch_size"),
        "accum_iter": saved.get("accum_iter"),
        "world_size": state["world_size"],
    }
    for name, value in factors.items():
        if not isinstance(value, int) or value < 1:
            raise UserError(f"--resume {args.resume}: its {name} is {value!r}")
    images = saved["batch_size"] * saved["accum_iter"] * state["world_size"]
    if images == global_batch(args, dist):
        return args
    made = (
        f"{args.resume}: its updates were of {images} images, --batch-size {saved['batch_size']} x "
        f"--accum-iter {saved['accum_iter']} x {state['world_size']} processes"
    )
    if images % dist.world_size:
        fitting = ", ".join(str(n) for n in range(1, images + 1) if images % n == 0 and n <= 64)
        raise UserError(f"{made}; {dist.world_size} processes cannot make them; these numbers can: {fitting}")
    share = images // dist.world_size
    even = 2 if mixes(args) else 1
    sizes = [size for size in range(even, args.batch_size + 1, even) if share % size == 0]
    if not sizes or dist.world_size == state["world_size"]:
        fitting = "; ".join(f"--batch-size {b} --accum-iter {share // b}" for b in fitting_sizes(share, even))
        raise UserError(f"{made}; with {dist.world_size} these go on with it: {fitting or 'none'}")
    report(
        dist,
        f"{made}; going on with --batch-size {sizes[-1]} --accum-iter {share // sizes[-1]} "
        f"x {dist.world_size} processes",
    )
    return argparse.Namespace(**vars(args) | {"batch_size": sizes[-1], "accum_iter": share // sizes[-1]})


def fitting_sizes(share: int, even: int) -> list[int]:
    """The largest batch sizes, at most four, of which a whole number makes `share` images."""
    return [size for size in range(share, 0, -1) if share % size == 0 and size % even == 0][:4]


def need(state: dict[str, Any], path: str, *keys: str) -> None:
    """Raise UserError for a file that has not all a run goes on from."""
    missing = [key for key in keys if state.get(key) is None]
    if missing:
        raise UserError(
            f"--resume {path}: no {', '.join(missing)} in it, so it is not a run's checkpoint; "
            "--finetune begins a new run from its weights"
        )


def identity(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint and the run that continues it have to share."""
    args = trainer.args
    return {
        "arch": models.resolve_arch(args.arch),
        "model_kwargs": full_model_kwargs(args),
        "num_classes": trainer.data.num_classes,
        "input_size": list(args.input_size),
    }


def checkpoint_state(trainer: Trainer) -> dict[str, Any]:
    """Everything to go on from, and everything that prediction needs to know."""
    data = trainer.data
    state = {"model": trainer.model.state_dict(), "optimizer": trainer.optimizer.state_dict()}
    if trainer.ema is not None:
        state["model_ema"] = trainer.ema.module.state_dict()
    if trainer.scaler.is_enabled():
        state["scaler"] = trainer.scaler.state_dict()
    return (
        state
        | identity(trainer)
        | asdict(trainer.progress)
        | {
            "mean": list(data.mean),
            "std": list(data.std),
            "crop_pct": data.crop_pct,
            "interpolation": data.interpolation,
            "class_names": list(data.class_names),
            "args": vars(trainer.args),
            "world_size": trainer.dist.world_size,
            "version": {"torch": torch.__version__, "timm": timm.__version__},
        }
    )


def restore(trainer: Trainer, state: dict[str, Any]) -> None:
    """Take over a checkpoint; raises UserError that names what differs."""
    path, progress = trainer.args.resume, trainer.progress
    need(state, path, "model", "optimizer", "args", "world_size", *asdict(progress))
    for key, value in identity(trainer).items():
        if json.dumps(state.get(key)) != json.dumps(value):  # a config's lists are a command line's tuples
            raise UserError(f"--resume {path}: its {key} is {state.get(key)}, this run's is {value}")
    check_progress(state, path)
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
    for name in asdict(progress):
        setattr(progress, name, state[name])
    progress.step = progress.step // state["args"]["accum_iter"] * trainer.args.accum_iter
    if progress.step > len(trainer.data.train):
        raise UserError(
            f"--resume {path}: its step {progress.step} is beyond an epoch's "
            f"{len(trainer.data.train)}; is it of another data set?"
        )
    if progress.epoch > 0:
        trainer.scheduler.step(progress.epoch - 1)


def check_progress(state: dict[str, Any], path: str) -> None:
    """Raise UserError unless a checkpoint says where it stands as `Progress` does."""
    for name, default in asdict(Progress()).items():
        wanted = (int, float) if isinstance(default, float) else type(default)
        if isinstance(state[name], bool) or not isinstance(state[name], wanted):
            raise UserError(f"--resume {path}: its {name} is {state[name]!r}")
    meters = state["meters"]
    if state["step"] and meters.keys() != set(METERS):
        raise UserError(f"--resume {path}: its meters are {list(meters)}, not {list(METERS)}")
    for name, value in meters.items():
        if not isinstance(value, (int, float)):
            raise UserError(f"--resume {path}: its {name} is {value!r}")


def check_optimizer_state(trainer: Trainer) -> None:
    """Raise ValueError for a loaded state that is not as the optimiser makes it.

    torch takes any, and stumbles over it at the next update.
    """
    made: dict[torch.Size, dict[str, Any]] = {}
    fresh = build_optimizer(trainer.args, trainer.model, trainer.dist)
    for group, own in zip(trainer.optimizer.param_groups, fresh.param_groups, strict=True):
        for name, value in own.items():
            kind = (int, float) if isinstance(value, (int, float)) else (tuple, list)
            if isinstance(value, (int, float, tuple)) and not isinstance(group.get(name), kind):
                raise ValueError(f"its optimizer has {group.get(name)!r} for {name}")
        for weight in group["params"]:
            state = trainer.optimizer.state.get(weight)
            if state:
                if weight.shape not in made:
                    made[weight.shape] = state_after_a_step(trainer, weight)
                if (found := shapes(state)) != made[weight.shape]:
                    raise ValueError(f"its optimizer holds {found} for a weight, not {made[weight.shape]}")


def state_after_a_step(trainer: Trainer, weight: Tensor) -> dict[str, Any]:
    """`shapes` of the state that the optimiser keeps for a weight like this one."""
    trial = nn.Parameter(torch.zeros_like(weight))
    trial.grad = torch.zeros_like(weight)
    alone = argparse.Namespace(**vars(trainer.args) | {"layer_decay": None})
    optimizer = build_optimizer(alone, [trial], trainer.dist)
    optimizer.step()
    return shapes(optimizer.state[trial])


def shapes(state: dict[str, Any]) -> dict[str, Any]:
    """What each entry of a weight's optimiser state is: a tensor's shape, or a type."""
    return {
        name: tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__ for name, value in state.items()
    }


# -------------------------------------------------------------------------------------------- what is told


# No bar: an ImageNet epoch's figures then fit into 80 columns.
BAR = "{desc}: {percentage:3.0f}% of {total_fmt} [{remaining}, {rate_fmt}{postfix}]"


class Display:
    """The progress of an epoch: a bar on a terminal, plain lines elsewhere, on the main process only."""

    def __init__(self, trainer: Trainer):
        args, progress = trainer.args, trainer.progress
        self._trainer = trainer
        self._images = args.batch_size * trainer.dist.world_size
        self._steps = len(trainer.data.train)
        self._bar = None
        if trainer.dist.is_main and sys.stderr.isatty():
            self._bar = tqdm(
                desc=f"epoch {progress.epoch}",
                total=self._steps * self._images,
                unit=" images",
                initial=progress.step * self._images,
                leave=False,
                dynamic_ncols=True,
                bar_format=BAR,
            )
        self._began, self._first = time.perf_counter(), progress.step

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, loss: float) -> None:
        """After an update."""
        trainer, step = self._trainer, self._trainer.progress.step
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", lr=f"{trainer.lr:.2e}", refresh=False)
            self._bar.update(trainer.args.accum_iter * self._images)
        elif step // trainer.args.accum_iter % trainer.args.print_freq == 0:
            seconds = (time.perf_counter() - self._began) / (step - self._first)
            report(
                trainer.dist,
                f"epoch {trainer.progress.epoch} step {step}/{self._steps}: loss {loss:.4f}, "
                f"lr {trainer.lr:.2e}, {self._images / seconds:.0f} images/s, "
                f"{seconds * (self._steps - step):.0f} s to go",
            )


def report(dist: Distributed, line: str) -> None:
    """A line for the user, once for the job."""
    if dist.is_main:
        print(line, flush=True)


def describe(trainer: Trainer) -> None:
    """What is about to be trained, in two lines."""
    args, dist, precision = trainer.args, trainer.dist, trainer.precision
    amp = f", autocast {precision.amp}" if precision.amp is not None else ""
    height, width = args.input_size
    report(
        dist,
        f"{models.resolve_arch(args.arch)}: {parameters(trainer.model):,} parameters, "
        f"{args.data_set} at {height}x{width}, {trainer.data.num_classes} classes, "
        f"{dist.device}{amp}",
    )
    report(
        dist,
        f"{len(trainer.data.train)} steps an epoch, {global_batch(args, dist)} images an update, "
        f"lr up to {max(trainer.scheduler.base_values):.3g}; files go to {args.output_dir}",
    )


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def log_row(trainer: Trainer, results: dict[str, float]) -> dict[str, float]:
    """The epoch's line of log.txt; accuracies in per cent, seconds of training alone."""
    args, dist, progress, sums = trainer.args, trainer.dist, trainer.progress, trainer.progress.meters
    images = len(trainer.data.train) * args.batch_size * dist.world_size
    row = {"train_lr": trainer.lr, "train_loss": sums["loss"] / sums["updates"]}
    row |= {f"test_{name}": value for name, value in results.items()}
    row |= {
        "epoch": progress.epoch,
        "n_parameters": parameters(trainer.model),
        "grad_norm": sums["norm"] / max(sums["updates"] - sums["overflows"], 1),
        "overflows": int(sums["overflows"]),
        "samples_seen": (progress.epoch + 1) * images,
        "images_per_second": round(images / sums["seconds"], 1),
        "seconds": round(sums["seconds"], 2),
    }
    if args.skip_bad_images:
        skipped = torch.tensor(len(trainer.data.train.skipped), device=dist.device)
        row["skipped_images"] = int(dist.sum(skipped))
    told = ("train_loss", "test_loss", "test_acc1", "seconds")
    shown = ", ".join(f"{name} {row[name]:.4g}" for name in told)
    report(dist, f"epoch {progress.epoch}: {shown}")
    return row


def farewell(trainer: Trainer) -> None:
    """The best accuracy, and what was skipped."""
    skipped = trainer.data.skipped(trainer.dist)
    if skipped is not None:
        report(trainer.dist, skipped)
    progress = trainer.progress
    report(
        trainer.dist,
        f"best top-1 {progress.best_acc1:.2f} % in epoch {progress.best_epoch}; see {trainer.args.output_dir}",
    )
