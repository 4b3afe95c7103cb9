"""The training loop. ``fit`` is a whole run, from the first epoch to the last; read this file top to bottom.

A task (`training.task.Task`) defines what is trained. The engine trains it and makes the run resumable.
"""

import argparse
import json
import math
import shlex
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from timm.utils import distribute_bn
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from runtime import checkpoints
from runtime.processes import init_distributed
from runtime.provenance import describe_run
from runtime.run_directory import RunDirectory
from training.log import describe, log_row, peak_memory, profiler, progress_bar, show_progress
from training.optimizer import images_per_update
from training.precision import choose_precision, set_up_device
from training.resume import LAST, checkpoint_state, find_checkpoint, restore, with_global_batch
from training.task import Task
from training.trainer import Run, Trainer, set_mode
from utils import Interrupted, NonFiniteError, StopSignals, UserError, seed_step, seeded

SMALLEST_SCALE = 2.0**-14  # smallest scale of the fp16 loss; an overflow at this scale is an error
NAMED_FILES = 32  # at most this many sample files in an error message


def fit(kind: type[Task], args: argparse.Namespace) -> None:
    """Train a task to the last epoch, starting from the checkpoint of --resume if there is one.

    With --eval, only evaluate it. With --dry-run, only try one update and one evaluation batch. Both write nothing.

    Raises:
        Interrupted: a process received a stop signal; the run was saved first.
        NonFiniteError: a loss or gradient was NaN or infinite; no process updated its weights with it.
        UserError: a flag or the checkpoint does not fit the machine or the model, or another run uses the directory.
    """
    dist = init_distributed(args.device)
    if args.sync_bn and dist.device.type != "cuda":
        raise UserError("--sync-bn needs CUDA; on a CPU, use --freeze-bn to be independent of the number of processes")
    set_up_device(dist.device, kind.fixed_sizes)
    opened = nullcontext()
    if dist.is_main and not (args.eval or args.dry_run):
        opened = RunDirectory(args.output_dir, kind.ranked_by, kind.plots, args.wandb)
    with opened as directory:
        checkpoint = find_checkpoint(args, dist)
        if checkpoint is not None and not args.eval:
            args = with_global_batch(args, checkpoint, dist)
        run = Run(args, dist, choose_precision(args, dist.device), directory, checkpoint)
        task = kind(run)
        with StopSignals(dist.is_main) as stop:
            trainer = Trainer(run, task, stop)
            if checkpoint is not None:
                restore(trainer, checkpoint)
            if args.dry_run:
                dry_run(trainer)
            elif args.eval:
                dist.say(json.dumps(evaluate(trainer)))
            else:
                train(trainer)


def train(trainer: Trainer) -> None:
    """Train, evaluate and save, epoch by epoch."""
    args, progress, directory = trainer.args, trainer.progress, trainer.directory
    if directory is not None:
        directory.truncate_log(progress.epoch)
        record = describe_run(vars(args), sys.argv, trainer.dist.world_size)
        directory.write_args(record, resuming=trainer.checkpoint is not None)
    describe(trainer)
    if progress.epoch >= trainer.epochs:
        trainer.dist.say(f"nothing left to train: {progress.epoch} epochs are done; a larger --epochs continues")
    elif stops_early(trainer):
        trainer.dist.say(f"nothing left to train: --early-stop {args.early_stop} ended this run")
    if progress.epoch > 0 and progress.step == 0:
        # The run may have crashed between writing the files of an epoch.
        save_epoch(trainer, trainer.checkpoint)

    with profiler(trainer) as profile:
        while progress.epoch < trainer.epochs and not stops_early(trainer):
            try:
                train_one_epoch(trainer, profile)
                results = evaluate(trainer)
            except Interrupted:
                save_last(trainer)
                command = shlex.join(["python", sys.argv[0], "--resume", args.output_dir])
                trainer.dist.say(f"saved {args.output_dir}/{LAST}; to resume: {command}")
                raise
            row = log_row(trainer, results)
            score = trainer.task.ranked_by  # the better of the weights and their average
            progress.end_epoch(*max((results[score], False), (results.get(f"{score}_ema", -math.inf), True)))
            trainer.scheduler.step(progress.epoch - 1, progress.score)  # the plateau schedule uses the score
            # After a crash between these two, the epoch is repeated and writes the same files again.
            if directory is not None:
                directory.log_row(row, progress.best_epoch)
            save_epoch(trainer, checkpoint_state(trainer))
    best = trainer.task.score_format.format(progress.best_score)
    trainer.dist.say(f"best {best} in epoch {progress.best_epoch}; see {args.output_dir}")


def stops_early(trainer: Trainer) -> bool:
    """Whether the score has not improved in the last --early-stop epochs."""
    patience, progress = trainer.args.early_stop, trainer.progress
    return 0 < patience < progress.epoch - progress.best_epoch


def save_last(trainer: Trainer) -> None:
    """Write the checkpoint to resume from."""
    if trainer.directory is not None:
        checkpoints.save(trainer.directory.path / LAST, checkpoint_state(trainer))


def save_epoch(trainer: Trainer, state: Mapping[str, Any]) -> None:
    """Write the checkpoints of a finished epoch from `state`; calling this twice changes nothing."""
    args, epoch = trainer.args, trainer.progress.epoch
    kept = args.checkpoint_epochs and epoch % args.checkpoint_epochs == 0
    names = [f"checkpoint_{epoch:04d}.pth", LAST] if kept else [LAST]
    if trainer.directory is not None:
        trainer.directory.save_epoch(names, state, args.keep_best)
    trainer.dist.barrier()  # other ranks wait here, since the timeout of the next collective is shorter


def train_one_epoch(trainer: Trainer, profile: torch.profiler.profile | None) -> None:
    """Train from `progress.step` to the end of `progress.epoch`; may raise Interrupted between two updates."""
    args, progress, dist, task = trainer.args, trainer.progress, trainer.dist, trainer.task
    set_mode(task, trainer.model, args)
    loss, batches, began = 0.0, [], time.perf_counter()
    loaded = iter(task.train.epoch(progress.epoch, progress.step))

    with progress_bar(trainer) as bar:
        for step in range(progress.step, len(task.train)):
            asked = time.perf_counter()
            batches.append(next(loaded))
            progress.add(wait_seconds=time.perf_counter() - asked)
            loss = loss + add_gradient(trainer, batches[-1], step)
            if (step + 1) % args.accum_iter:
                continue

            done = progress.epoch * trainer.updates_per_epoch + progress.step // args.accum_iter
            trainer.scheduler.step_update(max(done - 1, 0))
            mean_loss, norm, stopping = update(trainer, loss, batches, step)
            now = time.perf_counter()
            overflow = not math.isfinite(norm)
            progress.step = step + 1
            progress.add(
                updates=1, overflows=overflow, loss=mean_loss, norm=0.0 if overflow else norm, seconds=now - began
            )
            loss, batches, began = 0.0, [], now
            show_progress(trainer, bar, mean_loss)
            if profile is not None:
                profile.step()
            if stopping:
                raise Interrupted(max(dist.gather_objects(trainer.stop.signum or 0)))
            if args.checkpoint_steps and progress.step // args.accum_iter % args.checkpoint_steps == 0:
                save_last(trainer)


def dry_run(trainer: Trainer) -> None:
    """Run one update and one evaluation batch twice; print the speed of the second time and the memory used."""
    args, dist, task, progress = trainer.args, trainer.dist, trainer.task, trainer.progress
    describe(trainer)
    task.val.rounds = 1
    batches = list(islice(task.train.epoch(progress.epoch, progress.step), args.accum_iter))
    for _ in range(2):  # the first time includes compilation and the choice of algorithms
        set_mode(task, trainer.model, args)
        began = time.perf_counter()
        loss = sum(add_gradient(trainer, batch, step) for step, batch in enumerate(batches, progress.step))
        update(trainer, loss, batches, progress.step)
        trained = time.perf_counter()
        evaluate(trainer)
    evaluated = min(args.batch_size * dist.world_size, len(task.val.dataset)) * (1 if trainer.ema is None else 2)
    dist.say(
        f"dry run: {images_per_update(args, dist) / (trained - began):.1f} images/s in training, "
        f"{evaluated / (time.perf_counter() - trained):.1f} in evaluation, {peak_memory(dist):.2f} GiB of "
        f"{'GPU ' if dist.device.type == 'cuda' else ''}memory; nothing was written",
    )


def add_gradient(trainer: Trainer, batch: Any, step: int) -> Tensor:
    """Add the gradient of a micro-batch to its update; returns the micro-batch's share of the loss."""
    parallel, accum_iter = trainer.parallel, trainer.args.accum_iter
    accumulates = (step + 1) % accum_iter and hasattr(parallel, "no_sync")  # DDP sums the gradients once
    with parallel.no_sync() if accumulates else nullcontext():
        loss = step_loss(trainer, batch, trainer.progress.epoch, step) / accum_iter
        trainer.scaler.scale(loss).backward()
    return loss.detach()


def step_loss(trainer: Trainer, batch: Any, epoch: int, step: int) -> Tensor:
    """Return the loss of a micro-batch; every random choice is keyed on (seed, epoch, step)."""
    args, task = trainer.args, trainer.task
    with seeded(args.seed, "batch", epoch, step):
        prepared = task.prepare(batch)
    # Drop path differs between processes; mixing does not.
    seed_step(args.seed, epoch, step, trainer.dist.rank)
    with trainer.precision.autocast():
        return task.loss(trainer.parallel, prepared)


def update(trainer: Trainer, loss: Tensor, batches: list[Any], step: int) -> tuple[float, float, bool]:
    """Update the weights with the accumulated gradients of `batches`.

    Returns the mean loss over all processes, the norm of the gradient before clipping, and whether any process
    received a signal. An fp16 gradient that overflows (its norm is not finite) changes only the scale, not the weights.

    Raises:
        NonFiniteError: on every process, if the loss or gradient is not finite, except for an fp16 overflow.
    """
    args, dist, scaler = trainer.args, trainer.dist, trainer.scaler
    scaler.unscale_(trainer.optimizer)
    weights = [weight for weight in trainer.model.parameters() if weight.grad is not None]
    norm = get_total_norm([weight.grad for weight in weights])  # DDP averages gradients: equal on all processes
    signalled = loss.new_full((), float(trainer.stop.signum or 0))
    shared = dist.sum(torch.stack([loss, signalled]).double())
    # The only place where an update waits for the device.
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


def non_finite(trainer: Trainer, what: str, batches: list[Any], step: int) -> NonFiniteError:
    """Build the error, which names the epoch, the step and the samples of the update on all processes.

    If the outputs of some samples alone are not finite, it names only those samples.
    """
    task = trainer.task
    trainer.model.eval()
    found = [sample for batch in batches for sample in task.finite_samples(trainer.model, batch)]
    found = [sample for process in trainer.dist.gather_objects(found) for sample in process]
    named = [index for index, finite in found if not finite] or [index for index, _ in found]
    files = [task.sample_name(index) for index in named[:NAMED_FILES]]
    more = f" and {len(named) - len(files)} more" if len(named) > len(files) else ""
    where = f"epoch {trainer.progress.epoch}, step {step}, lr {trainer.lr:.6g}"
    return NonFiniteError(f"{where}: {what}; no weight was changed. Samples: {', '.join(files)}{more}")


def evaluate(trainer: Trainer) -> dict[str, float]:
    """Evaluate the model, and its average (EMA), whose results have names ending in ``_ema``."""
    evaluated = {"": trainer.model} | ({"_ema": trainer.ema.module} if trainer.ema is not None else {})
    results = {}
    for suffix, model in evaluated.items():
        if trainer.dist.world_size > 1:
            distribute_bn(model, trainer.dist.world_size)  # use the statistics of the main process, which saves them
        found = trainer.task.evaluate(model, trainer.stop)
        results |= {name + suffix: value for name, value in found.items()}
    return results
