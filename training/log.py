"""Output of a run: its description, progress, log rows, profile and summary."""

import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import models
from runtime.processes import Distributed
from training.evaluation import BAR
from training.model import count_parameters
from training.optimizer import images_per_update
from training.trainer import Trainer
from utils import say

FEW_UPDATES = 20  # a run with fewer updates cannot learn


def describe(trainer: Trainer) -> None:
    """Print the model, data and schedule; warn if the run is too short to learn, or for its warm-up."""
    args, dist, precision, scheduler = trainer.args, trainer.dist, trainer.precision, trainer.scheduler
    if args.config is not None:
        dist.say(f"recipe: {args.config}")
    amp = f", autocast {precision.amp}" if precision.amp is not None else ""
    total, trained = count_parameters(trainer.model), count_parameters(trainer.model, trained=True)
    parameters = f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")
    dist.say(f"{models.resolve_arch(args.arch)}: {parameters}, {trainer.task.describe()}, {dist.device}{amp}")
    peak = max(scheduler.base_values)
    dist.say(
        f"{len(trainer.task.train)} steps an epoch, {images_per_update(args, dist)} images an update, {args.opt}, "
        f"lr up to {peak:.3g}; files go to {args.output_dir}",
    )
    updates = trainer.updates_per_epoch * trainer.epochs
    if updates < FEW_UPDATES:
        dist.say(f"warning: the number of updates is only {updates}: use more --epochs or a smaller --batch-size")
    if scheduler.warmup_t >= args.epochs * (trainer.updates_per_epoch if args.sched_on_updates else 1):
        dist.say(f"warning: the warm-up does not end within --epochs {args.epochs}; choose a shorter warm-up")


def progress_bar(trainer: Trainer) -> tqdm:
    """A progress bar of an epoch, on the main process if it has a terminal."""
    progress, images = trainer.progress, trainer.args.batch_size * trainer.dist.world_size
    return tqdm(
        desc=f"epoch {progress.epoch}",
        total=len(trainer.task.train) * images,
        unit=" images",
        initial=progress.step * images,
        leave=False,
        dynamic_ncols=True,
        bar_format=BAR,
        disable=None if trainer.dist.is_main else True,  # None: only without a terminal
    )


def show_progress(trainer: Trainer, bar: tqdm, loss: float) -> None:
    """Show the progress after an update: on the bar, or without one as a line every --print-freq updates."""
    args, dist, progress = trainer.args, trainer.dist, trainer.progress
    images, steps = args.batch_size * dist.world_size, len(trainer.task.train)
    seconds = progress.meters["seconds"] / progress.step
    left = seconds * (steps - progress.step)
    run_left = tqdm.format_interval(left + seconds * steps * (trainer.epochs - progress.epoch - 1))
    if not bar.disable:
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{trainer.lr:.2e}", run=run_left, refresh=False)
        bar.update(args.accum_iter * images)
    elif progress.step // args.accum_iter % args.print_freq == 0:
        dist.say(
            f"epoch {progress.epoch} step {progress.step}/{steps}: loss {loss:.4f}, lr {trainer.lr:.2e}, "
            f"{images / seconds:.0f} images/s, {tqdm.format_interval(left)} to go (the run: {run_left})",
        )


def log_row(trainer: Trainer, results: dict[str, float]) -> dict[str, float]:
    """Return the epoch's row of log.txt, and print its main values.

    seconds: training time without evaluation; wait_seconds: the part of it spent waiting for the loader, on the main
    process; memory_gib: peak memory of the main process so far, on its GPU if it uses one.
    """
    args, dist, progress, sums = trainer.args, trainer.dist, trainer.progress, trainer.progress.meters
    task = trainer.task
    images = len(task.train) * args.batch_size * dist.world_size
    row = {"train_lr": trainer.lr, "train_loss": sums["loss"] / sums["updates"]}
    row |= {f"test_{name}": value for name, value in results.items()}
    row |= {
        "epoch": progress.epoch,
        "n_parameters": count_parameters(trainer.model),
        "grad_norm": sums["norm"] / max(sums["updates"] - sums["overflows"], 1),
        "overflows": int(sums["overflows"]),
        "samples_seen": (progress.epoch + 1) * images,
        "images_per_second": round(images / sums["seconds"], 1),
        "seconds": round(sums["seconds"], 2),
        "wait_seconds": round(sums["wait_seconds"], 2),
        "memory_gib": round(peak_memory(dist), 2),
    }
    shown = ["train_loss", *(f"test_{name}" for name in task.shown), "seconds", "wait_seconds", "memory_gib"]
    if args.skip_bad_images:
        row["skipped_images"] = int(dist.sum(torch.tensor(len(task.train.skipped), device=dist.device)))
        shown.append("skipped_images")
    speed = f"{row['images_per_second'] / dist.world_size:.0f} images/s per process"
    dist.say(f"epoch {progress.epoch}: " + ", ".join([*(f"{name} {row[name]:.4g}" for name in shown), speed]))
    return row


def peak_memory(dist: Distributed) -> float:
    """The peak memory of this process so far in GiB, on its GPU if it uses one."""
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated(dist.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def profiler(trainer: Trainer) -> AbstractContextManager[torch.profiler.profile | None]:
    """A profiler that traces --profile updates of the main process after three others; None without --profile."""
    args, path = trainer.args, Path(trainer.args.output_dir) / "trace.json"

    def write(profile: torch.profiler.profile) -> None:
        profile.export_chrome_trace(str(path))
        say(f"wrote {path}; open it at https://ui.perfetto.dev")

    if not (args.profile and trainer.dist.is_main):
        return nullcontext()
    steps = torch.profiler.schedule(wait=2, warmup=1, active=args.profile, repeat=1)
    return torch.profiler.profile(schedule=steps, on_trace_ready=write)
