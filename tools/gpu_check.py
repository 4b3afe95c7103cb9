"""Run one part of tools/gpu_check.sh, the checks that need a GPU. Requires only torch, torchvision and timm.

    python -m tools.gpu_check PART OUTPUT_DIR --device cuda

Each result is printed as a line of JSON as soon as it is measured. `--small` uses small sizes, to test the checks on a
CPU.
"""

import argparse
import copy
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
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
from inputs.images import ImageDataset, array_dataset
from models.layers import SPECTRAL_PRECISIONS
from models.mixers import build_mixer
from runtime.cli import run_cli
from tools.benchmark import layer_step
from tools.contenders import Runner, Settings, take_turns, time_in_turns
from tools.machine import describe_machine
from training.arguments import Parser
from training.precision import set_up_device
from utils import one_line

MODELS = ("spectformer_xs", "deit_small_patch16_224", "spectformer_h_s", "pvt_v2_b2", "svt_h_s", "convnext_tiny")
GATES = (  # mixer, side of its grid, channels
    ("spectral", 14, 384),
    ("spectral", 28, 128),
    ("spectral", 56, 64),
    ("scattering_channel", 28, 128),
    ("scattering_channel", 56, 64),
)
CLASSES = 8


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(__doc__, prog="python -m tools.gpu_check")
    parser.add_argument("part", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("output", type=Path, metavar="OUTPUT_DIR", help="folder of the run directories")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="device to check")
    parser.add_argument("--small", action="store_true", help="use small sizes, to test the checks on a CPU")
    args = parser.parse_args(argv)
    PARTS[args.part](args)


def report(name: str, **figures: Any) -> None:
    print(json.dumps({"name": name} | figures), flush=True)


def parity(args: argparse.Namespace) -> None:
    """Compare logits and gradients in float32 and bf16 on the device with float64 on the CPU."""
    report("machine", **describe_machine())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    side = 32 if args.small else 224
    for name in ("spectformer_h_n", "svt_h_n") if args.small else ("spectformer_ti", "spectformer_h_s", "svt_h_s"):
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=side).eval()
        images = torch.randn(2, 3, side, side)
        expected = logits_and_gradient(copy.deepcopy(model).double(), images.double())
        model.to(args.device)
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast(args.device, dtype, enabled=dtype != torch.float32):
                found = logits_and_gradient(model, images.to(args.device))
            errors = [((a.double().cpu() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True)]
            report(name, dtype=str(dtype), logit_error=errors[0], gradient_error=errors[1])


def logits_and_gradient(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits, and the gradient of the sum of their squares with respect to all weights."""
    model.zero_grad()
    logits = model(images)
    (logits if logits.dtype == torch.float64 else logits.float()).square().sum().backward()
    gradients = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
    return logits.detach(), torch.cat(gradients)


def gates(args: argparse.Namespace) -> None:
    """Time training steps of the spectral mixers, in half precision and float32, eager and compiled."""
    set_up_device(torch.device(args.device))
    batch, rounds = (1, 1) if args.small else (128, 20)
    settings = Settings(args.device, "bfloat16")
    shapes = GATES[:1] if args.small else GATES
    for (mixer, side, channels), compiled, precision in product(shapes, (False, True), SPECTRAL_PRECISIONS):
        torch.compiler.reset()
        layer = build_mixer(mixer, channels, (side, side), 1).to(args.device)
        models.set_spectral_precision(layer, precision)
        x = torch.randn(batch, side, side, channels, device=args.device)
        step = partial(layer_step, torch.compile(layer) if compiled else layer, x, settings, training=True)
        figures = {"grid": side, "channels": channels, "batch": batch, "precision": precision, "compiled": compiled}
        with reported_errors(mixer, **figures):
            seconds = time_in_turns({mixer: step}, rounds, args.device)
            report(mixer, **figures, ms=1000 * statistics.median(seconds[mixer]))


@contextmanager
def reported_errors(name: str, **figures: Any) -> Iterator[None]:
    """Report an error as a result and continue, because the next measurement may succeed."""
    try:
        yield
    except Exception as error:
        report(name, **figures, error=one_line(error)[:300])


def eager(args: argparse.Namespace, compile: bool = False) -> None:
    """Time training and inference of this project's and timm's models in bf16."""
    batch, side, rounds = (2, 32, 1) if args.small else (128, 224, 15)
    for name in ("test_vit",) if args.small else MODELS:
        torch.compiler.reset()
        with reported_errors(name, compiled=compile):
            settings = Settings(args.device, "bfloat16", compile, batch_size=batch, img_size=side, arch=name)
            report(name, compiled=compile, batch=batch, **speeds(settings, rounds))
        if args.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def speeds(settings: Settings, rounds: int) -> dict[str, float]:
    """Measure images/s in training and inference, and the peak memory; the model is freed afterwards."""
    runner = Runner(settings)
    seconds = take_turns({part: partial(runner.seconds, part) for part in ("training", "inference")}, rounds)
    rates = {f"{part}_images_per_s": settings.batch_size / statistics.median(seconds[part]) for part in seconds}
    return rates | {"peak_mib": runner.peak_memory()}


def gratings(options: DatasetOptions, count: int) -> ImageDataset:
    """Generate noisy gratings of 64 px, classified by orientation; they need no files and no network."""
    rng = np.random.default_rng(options.split == "train")
    labels = np.arange(count if options.split == "train" else count // 8) % CLASSES
    angles, phases = labels * math.pi / CLASSES, rng.uniform(0, 2 * math.pi, len(labels))
    rows, columns = np.mgrid[:64, :64]
    waves = 0.4 * (np.multiply.outer(np.sin(angles), rows) + np.multiply.outer(np.cos(angles), columns))
    images = 128 + 40 * np.cos(waves + phases[:, None, None]) + rng.normal(0, 40, waves.shape)
    names = [f"{180 * label // CLASSES} degrees" for label in range(CLASSES)]
    return array_dataset(f"GRATINGS/{options.split}", images.clip(0, 255).astype(np.uint8), labels, names)


def train(args: argparse.Namespace) -> None:
    """Train with main_spectformer.py, in one process or, under torchrun, in several; log.txt has the results."""
    count, epochs = (512, 1) if args.small else (4096, 3)
    data = catalogue.DatasetSpec(partial(gratings, count=count), needs_path=False, glyphs=True)
    catalogue.DATASETS["GRATINGS"] = data
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    directory = args.output / f"train_{processes}_{'torchrun' if 'WORLD_SIZE' in os.environ else 'alone'}"
    flags = f"""--data-set GRATINGS --input-size 64 --arch spectformer_h_n --model-kwargs stem_stride=4 --aa none
        --mixup 0 --cutmix 0 --opt nmuon --lr 4e-3 --unscale-lr --warmup-epochs 0 --epochs {epochs} --num-workers 2
        --batch-size {64 // processes} --device {args.device} --amp bf16"""
    main_spectformer.main([*flags.split(), "--output-dir", str(directory)])


def distributed(args: argparse.Namespace) -> None:
    """Run `train` under torchrun with NCCL (gloo on a CPU): with one process and, if possible, with two."""
    most = torch.cuda.device_count() if args.device == "cuda" else 2
    for processes in (1, 2)[: min(most, 2)]:
        launch = f"-m torch.distributed.run --standalone --nproc_per_node={processes} -m tools.gpu_check train"
        done = subprocess.run([sys.executable, *launch.split(), *sys.argv[2:]], cwd=Path(__file__).parents[1])
        report(f"torchrun with {processes} processes", exit_code=done.returncode)


PARTS = {
    "parity": parity,
    "gates": gates,
    "eager": eager,
    "compiled": partial(eager, compile=True),
    "train": train,
    "distributed": distributed,
}

if __name__ == "__main__":
    run_cli(main)
