"""One part of tools/gpu_check.sh: what only a GPU shows, with torch, torchvision and timm alone.

    python -m tools.gpu_check PART OUTPUT_DIR --device cuda

Appends each result to OUTPUT_DIR/results.jsonl as soon as it is measured, and prints it. `--small` takes sizes for a
rehearsal on a CPU.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import main_spectformer
import models
from inputs import catalogue
from inputs.dataset_options import DatasetOptions
from inputs.images import ImageArrays
from models.mixers import build_mixer
from runtime.cli import run_cli
from tools.command_line import ToolParser, describe_machine
from tools.contenders import Contender, Runner, Settings, seconds_of, set_up_device
from utils import one_line

MODELS = ("spectformer_xs", "deit_small_patch16_224", "spectformer_h_s", "pvt_v2_b2", "svt_h_s", "convnext_tiny")
GRIDS = {"spectral": ((14, 384), (28, 128), (56, 64)), "scattering_channel": ((28, 128), (56, 64))}
CLASSES = 8


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("gpu_check", __doc__)
    parser.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="for results.jsonl and run directories")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="to check")
    parser.add_argument("--small", action="store_true", help="sizes for a rehearsal on a CPU")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)

    def report(name: str, **figures: Any) -> None:
        line = json.dumps({"part": args.part, "name": name} | figures)
        print(line, flush=True)
        with (args.output / "results.jsonl").open("a") as file:
            file.write(line + "\n")

    PARTS[args.part](args.device, args.small, args.output, report)


def parity(device: str, small: bool, output: Path, report: Callable) -> None:
    """Logits and gradients in float32 and bf16 on the device, against float64 on the CPU."""
    report("machine", **describe_machine())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    side = 32 if small else 224
    for name in ("spectformer_h_n", "svt_h_n") if small else ("spectformer_ti", "spectformer_h_s", "svt_h_s"):
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=side).eval()
        images = torch.randn(2, 3, side, side)
        expected = logits_and_gradient(copy.deepcopy(model).double(), images.double())
        model.to(device)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                found = logits_and_gradient(model, images.to(device))
            errors = [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
            report(name, dtype=str(dtype), logit_error=errors[0], gradient_error=errors[1])


def logits_and_gradient(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, gradient of their squares with respect to all weights)."""
    model.zero_grad()
    logits = model(images)
    (logits if logits.dtype == torch.float64 else logits.float()).square().sum().backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return logits.detach(), torch.cat(gradients)


def gates(device: str, small: bool, output: Path, report: Callable) -> None:
    """Forward and backward of the spectral mixers: in half precision and in float32, eager and compiled."""
    set_up_device(device)
    batch, warm_up, rounds = (1, 1, 1) if small else (128, 5, 20)
    for mixer, grids in GRIDS.items():
        for side, channels in grids[:1] if small else grids:
            half = build_mixer(mixer, channels, (side, side), 1).to(device)
            exact = copy.deepcopy(half)
            models.set_spectral_precision(exact, "float32")
            x = torch.randn(batch, side, side, channels, device=device, requires_grad=True)
            for compiled, (precision, layer) in itertools.product((False, True), (("half", half), ("float32", exact))):
                torch.compiler.reset()
                call = torch.compile(layer) if compiled else layer
                figures = {"grid": side, "channels": channels, "batch": batch, "precision": precision}
                with reported_errors(report, mixer, **figures, compiled=compiled):
                    times = [seconds_of(partial(layer_step, call, x), device) for _ in range(warm_up + rounds)]
                    report(mixer, **figures, compiled=compiled, ms=1000 * statistics.median(times[warm_up:]))


def layer_step(layer: Callable, x: torch.Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(x)
    y.sum().backward()


@contextmanager
def reported_errors(report: Callable, name: str, **figures: Any) -> Iterator[None]:
    """What fails is a result too, and the next measurement may succeed."""
    try:
        yield
    except Exception as error:
        report(name, **figures, error=one_line(error)[:300])


def eager(device: str, small: bool, output: Path, report: Callable, compile: bool = False) -> None:
    """Our models beside their peers: a training step and inference in bf16."""
    batch, side, warm_up, rounds = (2, 32, 1, 1) if small else (128, 224, 5, 15)
    settings = Settings(device, "bfloat16", compile, False, batch, side)
    contenders = [Contender.parse(name, settings) for name in MODELS]
    if small:
        tiny = {"img_size": side, "embed_dim": 32, "depth": 2, "alpha": 1, "num_heads": 2}
        contenders = [Contender("spectformer_ti", "spectformer_ti", settings, tiny)]
    for contender in contenders:
        name = contender.label
        with reported_errors(report, name, compiled=compile):
            torch.compiler.reset()
            runner = Runner(contender)
            figures = {}
            for part in ("training", "inference"):
                times = [runner.seconds(part) for _ in range(warm_up + rounds)]
                figures[f"{part}_images_per_s"] = batch / statistics.median(times[warm_up:])
            if device == "cuda":
                figures["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            report(name, compiled=compile, batch=batch, **figures)
            del runner
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def compiled(device: str, small: bool, output: Path, report: Callable) -> None:
    """As `eager`, compiled."""
    eager(device, small, output, report, compile=True)


def gratings(options: DatasetOptions, count: int) -> ImageArrays:
    """Noisy gratings, 64 px, whose class is their orientation: data that needs neither a file nor the network."""
    rng = np.random.default_rng(0 if options.split == "train" else 1)
    labels = np.arange(count if options.split == "train" else count // 8) % CLASSES
    angles = labels * math.pi / CLASSES
    rows, columns = np.mgrid[:64, :64]
    phases = rng.uniform(0, 2 * math.pi, len(labels))
    waves = 0.4 * (rows * np.sin(angles)[:, None, None] + columns * np.cos(angles)[:, None, None])
    images = 128 + 40 * np.cos(waves + phases[:, None, None]) + rng.normal(0, 40, waves.shape)
    pixels = images.clip(0, 255).astype(np.uint8)[..., None].repeat(3, 3)
    names = [f"{180 * label // CLASSES} degrees" for label in range(CLASSES)]
    return ImageArrays(f"GRATINGS/{options.split}", pixels, labels, names)


def train(device: str, small: bool, output: Path, report: Callable) -> None:
    """A real training run by main_spectformer.py, of one process or, under torchrun, of several."""
    catalogue.DATASETS["GRATINGS"] = catalogue.DatasetSpec(
        partial(gratings, count=512 if small else 4096), needs_path=False, glyphs=True
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    directory = output / f"train_{processes}_{'torchrun' if 'WORLD_SIZE' in os.environ else 'alone'}"
    words = ["--data-set", "GRATINGS", "--input-size", "64", "--arch", "spectformer_h_n", "--aa", "none"]
    words += ["--model-kwargs", "stem_stride=4", "--opt", "nmuon", "--lr", "4e-3", "--unscale-lr", "--mixup", "0"]
    words += ["--cutmix", "0", "--warmup-epochs", "0", "--epochs", "1" if small else "3", "--num-workers", "2"]
    words += ["--batch-size", str(64 // processes), "--device", device, "--output-dir", str(directory), "--amp", "bf16"]
    main_spectformer.main(words)
    if os.environ.get("RANK", "0") == "0":
        rows = [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]
        names = ("train_loss", "test_loss", "test_acc1", "seconds", "images_per_second")
        report(directory.name, epochs=[{name: row.get(name) for name in names} for row in rows])


def distributed(device: str, small: bool, output: Path, report: Callable) -> None:
    """The same training under torchrun with NCCL (gloo on a CPU): one process, and two where there are two devices."""
    most = torch.cuda.device_count() if device == "cuda" else 2
    for processes in (1, 2)[: min(most, 2)]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
        command += ["tools.gpu_check", "train", str(output), "--device", device, *(["--small"] if small else [])]
        done = subprocess.run(command, cwd=Path(__file__).parents[1])
        report(f"torchrun with {processes} processes", exit_code=done.returncode)


PARTS = {
    "parity": parity,
    "gates": gates,
    "eager": eager,
    "compiled": compiled,
    "train": train,
    "distributed": distributed,
}

if __name__ == "__main__":
    run_cli(main)
