"""Output of a run: what is trained, the progress and the log row of an epoch, a profile, the summary."""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import models
from runtime.processes import Distributed
from training.evaluation import BAR
from training.model import count_parameters
from training.optimizer import highest_and_last_rate, images_per_update
from training.trainer import Trainer
from utils import atomic_write, say

FEW_UPDATES = 20  # of a whole run: too few to learn from


def report(dist: Distributed, line: str) -> None:
    """A line for the user, once for the job."""
    if dist.is_main:
        say(line)


def describe(trainer: Trainer) -> None:
    """Print what is about to be trained and how, with a warning if the schedule never reaches its peak."""
    args, dist, precision = trainer.args, trainer.dist, trainer.precision
    if args.config is not None:
        report(dist, f"recipe: {args.config}")
    amp = f", autocast {precision.amp}" if precision.amp is not None else ""
    total, trained = count_parameters(trainer.model), count_parameters(trainer.model, trained=True)
    parameters = f"{total:,} parameters" + (f" ({trained:,} trained)" if trained < total else "")
    report(dist, f"{models.resolve_arch(args.arch)}: {parameters}, {trainer.task.describe()}, {dist.device}{amp}")
    peak = max(trainer.scheduler.base_values)
    highest, last = highest_and_last_rate(args, peak, trainer.updates_per_epoch)
    report(
        dist,
        f"{len(trainer.task.train)} steps an epoch, {images_per_update(args, dist)} images an update, {args.opt}, "
        f"lr up to {highest:.3g}, {last:.3g} at the end; files go to {args.output_dir}",
    )
    updates = trainer.updates_per_epoch * trainer.epochs
    if updates < FEW_UPDATES:
        report(dist, f"warning: only {updates} updates in all: train for more --epochs, or with a smaller --batch-size")
    if highest < 0.5 * peak:
        warmup = "updates" if args.warmup_updates else "part" if args.warmup_part is not None else "epochs"
        length = getattr(args, f"warmup_{warmup}")
        report(
            dist,
            f"warning: --epochs {args.epochs} with --warmup-{warmup} {length} never reaches the peak lr of "
            f"{peak:.3g}; choose a shorter warm-up",
        )


class Display:
    """The progress of an epoch: figures on a terminal, plain lines elsewhere, on the main process only."""

    def __init__(self, trainer: Trainer):
        args, progress = trainer.args, trainer.progress
        self._trainer = trainer
        self._images = args.batch_size * trainer.dist.world_size
        self._steps = len(trainer.task.train)
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
        due = step // trainer.args.accum_iter % trainer.args.print_freq == 0
        if self._bar is None and not due:
            return
        seconds = (time.perf_counter() - self._began) / (step - self._first)
        left = seconds * (self._steps - step)
        run_left = tqdm.format_interval(left + seconds * self._steps * (trainer.epochs - trainer.progress.epoch - 1))
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.3f}", lr=f"{trainer.lr:.2e}", run=run_left, refresh=False)
            self._bar.update(trainer.args.accum_iter * self._images)
        else:
            report(
                trainer.dist,
                f"epoch {trainer.progress.epoch} step {step}/{self._steps}: loss {loss:.4f}, lr {trainer.lr:.2e}, "
                f"{self._images / seconds:.0f} images/s, {tqdm.format_interval(left)} to go (the run: {run_left})",
            )


def log_row(trainer: Trainer, results: dict[str, float]) -> dict[str, float]:
    """The epoch's line of log.txt.

    seconds: of training, without evaluation; wait_seconds: of these, waiting for the loader, on the main process;
    memory_gib: the largest amount so far of the main process, on its GPU if it uses one.
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
    if args.skip_bad_images:
        row["skipped_images"] = int(dist.sum(torch.tensor(len(task.train.skipped), device=dist.device)))
    shown = ("train_loss", *(f"test_{name}" for name in task.shown), "seconds", "wait_seconds", "memory_gib")
    speed = f"{row['images_per_second'] / dist.world_size:.0f} images/s per process"
    report(dist, f"epoch {progress.epoch}: " + ", ".join([*(f"{name} {row[name]:.4g}" for name in shown), speed]))
    return row


def report_dry_run(trainer: Trainer, training: float, evaluation: float) -> None:
    """What an update and a batch of evaluation took: seconds, as images a second, and memory."""
    args, dist = trainer.args, trainer.dist
    models_evaluated = 1 if trainer.ema is None else 2
    batch = min(args.batch_size * dist.world_size, len(trainer.task.val.dataset))
    report(
        dist,
        f"dry run: {images_per_update(args, dist) / training:.1f} images/s in training, "
        f"{models_evaluated * batch / evaluation:.1f} in evaluation, {peak_memory(dist):.2f} GiB of "
        f"{'GPU ' if dist.device.type == 'cuda' else ''}memory; nothing was written",
    )


def peak_memory(dist: Distributed) -> float:
    """The largest amount of memory that this process has used so far, on its GPU if it uses one, in GiB."""
    if dist.device.type == "cuda":
        return torch.cuda.max_memory_allocated(dist.device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # of what the system reports
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Profile:
    """Traces --profile updates of the main process after three others; a context manager that ends an epoch."""

    def __init__(self, trainer: Trainer):
        args = trainer.args
        self._path = Path(args.output_dir) / "trace.json"
        self._profiler = None
        if args.profile and trainer.dist.is_main:
            steps = torch.profiler.schedule(wait=2, warmup=1, active=args.profile, repeat=1)
            self._profiler = torch.profiler.profile(schedule=steps, on_trace_ready=self._write)

    def _write(self, profiler: torch.profiler.profile) -> None:
        with tempfile.TemporaryDirectory() as directory:
            profiler.export_chrome_trace(f"{directory}/trace.json")
            atomic_write(self._path, Path(directory, "trace.json").read_bytes())
        say(f"wrote {self._path}; open it at https://ui.perfetto.dev")

    def step(self) -> None:
        """After an update."""
        if self._profiler is not None:
            self._profiler.step()

    def __enter__(self) -> Profile:
        if self._profiler is not None:
            self._profiler.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def print_summary(trainer: Trainer) -> None:
    """What was skipped, and the best score."""
    dist, progress = trainer.dist, trainer.progress
    skipped = skipped_files(trainer.task.train, dist)
    if skipped is not None:
        report(dist, skipped)
    best = trainer.task.describe_score(progress.best_score)
    report(dist, f"best {best} in epoch {progress.best_epoch}; see {trainer.args.output_dir}")


def skipped_files(train: Any, dist: Distributed) -> str | None:
    """What --skip-bad-images left out on all processes, in one line; every one of them has to call it."""
    files = sorted({path for found in dist.gather_objects(sorted(train.skipped)) for path in found})
    if not files:
        return None
    named = ", ".join(files[:10]) + (", ..." if len(files) > 10 else "")
    return f"{len(files)} unreadable images were skipped, others took their places: {named}"
