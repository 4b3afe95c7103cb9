"""Measure models side by side: training step, inference, peak memory.

    python -m tools.benchmark svt_h_s plain:svt_h_s pvt_v2_b2
    python -m tools.benchmark --layers      # the CPU kernels of the mixers
    python -m tools.benchmark --loader DIR  # the input pipeline, and timm's
    python -m tools.benchmark --exactness DIR svt_h_s pvt_v2_b2 --dtype bfloat16
    python -m tools.benchmark --suite cpu --json FILE

A contender is NAME (any timm model, including this project's), "plain:NAME" (this project's model without its
CPU kernels) or "onnx:NAME" (in onnxruntime on a CPU, inference only). A dtype and "compile" may follow the name:
NAME@bfloat16,compile. Each contender runs in its own process, and the contenders take turns (A B B A ...). A
ratio compares two medians over the rounds.
"""

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import count, islice, product
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader
from torch import Tensor

from inputs.catalogue import build_dataset
from inputs.loader import Batch, KeyedImages, TrainLoader
from inputs.sampler import KeyedSampler
from inputs.transforms import RandomErasing, train_transform
from models import set_cpu_kernels
from models.flops import count_flops
from models.mixers import build_mixer
from runtime.cli import run_cli
from runtime.processes import Distributed, init_distributed
from tools.contenders import DTYPES, Runner, Settings, measure, parse_label, speed_ratio, time_in_turns
from tools.machine import describe_machine
from training.arguments import POSITIVE, WORKERS, Parser
from training.model import count_parameters
from training.precision import set_up_device
from utils import UserError, atomic_write

PARTS = ("inference", "training")
MIXERS = ("spectral", "scattering_channel", "scattering_channel_token", "attention")
GRIDS, CHANNELS = (7, 14, 28, 56), 64  # sides and channels of the mixers' grids
SEEDS, STEPS = (0, 1, 2), 50  # training runs of --exactness, and steps of each
RATE = 5e-4  # their peak learning rate, as in the published recipes
# The augmentation of both loaders.
RECIPE = {"color_jitter": 0.4, "interpolation": "bicubic"}
POLICY, ERASING = "rand-m9-mstd0.5-inc1", 0.25

DEIT = "deit_small_patch16_224"
SUITE = (  # the runs that docs/performance.md reports
    "svt_h_s@bfloat16 svt_h_s plain:svt_h_s pvt_v2_b2@bfloat16 pvt_v2_b2 --rounds 7",
    "spectformer_h_s@bfloat16 spectformer_h_s plain:spectformer_h_s pvt_v2_b2@bfloat16 pvt_v2_b2 --rounds 7",
    f"spectformer_xs@bfloat16 spectformer_xs plain:spectformer_xs {DEIT}@bfloat16 {DEIT} --rounds 7",
    "onnx:spectformer_xs spectformer_xs onnx:spectformer_h_s spectformer_h_s onnx:svt_h_s svt_h_s --batch-size 4"
    " --rounds 7 --parts inference",
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if sum(map(bool, (args.models, args.layers, args.loader, args.suite))) != 1:
        parser.error("name models to measure, or one of --layers, --loader and --suite")
    runs = []
    for words in map(shlex.split, SUITE) if args.suite else [argv]:
        command = f"{parser.prog} {shlex.join(words)}"
        if args.suite:
            print(f"\n$ {command}", flush=True)
        runs.append({"command": command} | run(parser.parse_args(words)))
        if args.json:
            atomic_write(args.json, json.dumps({"machine": describe_machine(), "runs": runs}, indent=1))


def run(args: argparse.Namespace) -> dict:
    """Run one comparison, print it, and return its settings and results."""
    set_up_device(init_distributed(args.device).device)
    settings = Settings(args.device, args.dtype, batch_size=args.batch_size, img_size=args.img_size)
    if args.layers and args.device == "cuda":
        raise UserError("--layers compares the CPU kernels of the mixers: use --device cpu")
    if args.layers:
        result = compare_layers(settings, args.rounds)
    elif args.loader:
        result = compare_loaders(args.loader, settings, args.workers, args.rounds)
    elif args.exactness:
        result = compare_exactness(args.models, args.exactness, settings)
    else:
        result = compare_models(args.models, settings, args.rounds, args.parts)
    return {"settings": asdict(settings), "rounds": args.rounds} | result


def build_parser() -> Parser:
    parser = Parser(__doc__, prog="python -m tools.benchmark")
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="model to measure: [plain:|onnx:]NAME[@SETTING,...]")
    add("--layers", action="store_true", help="compare this project's mixers with and without CPU kernels")
    add("--loader", metavar="DIR", help="compare the input pipeline with timm's on DIR/val")
    add("--exactness", metavar="DIR", help="compare half precision with float32 on DIR/val")
    add("--suite", choices=["cpu"], help="the runs that docs/performance.md reports")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="device to measure on")
    add("--dtype", choices=DTYPES, default="float32", help="autocast dtype; the weights stay float32")
    add("--batch-size", type=POSITIVE, default=16, metavar="N", help="images per step")
    add("--img-size", type=POSITIVE, default=224, metavar="N", help="image side in pixels")
    add("--rounds", type=POSITIVE, default=5, metavar="N", help="measurements of each contender")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"{' '.join(PARTS)} (default: both)")
    add("--workers", type=WORKERS, default=2, metavar="N", help="loader workers of --loader")
    add("--json", type=Path, metavar="FILE", help="also write all results, with machine and versions, to FILE")
    return parser


def compare_models(labels: Sequence[str], settings: Settings, rounds: int, parts: Sequence[str]) -> dict:
    """Measure each model, and compare its speed with each of the others; prints and returns the results."""
    contenders = {label: parse_label(label, settings) for label in labels}
    if any(own.onnx for own in contenders.values()) and (settings.device == "cuda" or "training" in parts):
        raise UserError("onnx:NAME needs --parts inference and --device cpu")
    rows = {}
    print(f"{'model':36}{'Mparam':>8}{'GMAC':>8}")
    for label, own in contenders.items():
        model = own.build()
        row = {"parameters": count_parameters(model), "gmacs": count_flops(model, settings.img_size) / 1e9}
        rows[label] = {"settings": asdict(own)} | row
        print(f"{label:36}{row['parameters'] / 1e6:8.1f}{row['gmacs']:8.2f}")
    ratios = {}
    for part, seconds, memory in measure(contenders, rounds, parts):
        print(f"\n{part:36}{'images/s':>12}{'MiB':>8}   speed relative to each model, in the same order")
        ratios[part] = {a: {b: speed_ratio(seconds, a, b) for b in labels} for a in labels}
        for label, times in seconds.items():
            rate, mib = settings.batch_size / statistics.median(times), memory[label]
            rows[label] |= {f"{part}_seconds": times, f"{part}_images_per_s": rate, f"{part}_peak_mib": mib}
            compared = "".join(f"{ratio:7.2f}" for ratio in ratios[part][label].values())
            print(f"{label:36}{rate:12.2f}{mib:8.0f} {compared}", flush=True)
    return {"models": rows, "ratios": ratios}


def compare_layers(settings: Settings, rounds: int) -> dict:
    """Compare mixers with and without CPU kernels on square grids; smaller grids get larger batches."""
    rows = []
    print(f"{'mixer':26}{'grid':>6}{'batch':>6}{'part':>12}{'ms':>9}{'plain':>9}{'ratio':>7}")
    for side, mixer in product(GRIDS, MIXERS):
        batch = max(1, settings.batch_size * 56**2 // max(side, 28) ** 2)
        x = torch.randn(batch, side, side, CHANNELS, device=settings.device)
        layer = build_mixer(mixer, CHANNELS, (side, side), CHANNELS // 32).to(settings.device)
        for part in PARTS:
            steps = {on: partial(layer_step, layer, x, settings, part == "training", on) for on in (True, False)}
            seconds = time_in_turns(steps, rounds, settings.device)
            ms, plain = (1000 * statistics.median(times) for times in seconds.values())
            row = {"mixer": mixer, "grid": side, "batch": batch, "part": part, "ms": ms, "plain_ms": plain}
            rows.append(row | {"channels": CHANNELS, "ratio": plain / ms})
            print(f"{mixer:26}{side:6}{batch:6}{part:>12}{ms:9.2f}{plain:9.2f}{plain / ms:7.2f}", flush=True)
    return {"layers": rows}


def layer_step(layer: Callable, x: Tensor, settings: Settings, training: bool, cpu_kernels: bool = True) -> None:
    """Run the forward pass of a layer on grids (B, H, W, C), and in training the backward pass."""
    set_cpu_kernels(cpu_kernels)
    with torch.inference_mode(not training), settings.autocast():
        y = layer(x.detach().requires_grad_(training))
    if training:
        y.backward(torch.ones_like(y))


def compare_loaders(folder: str, settings: Settings, workers: int, rounds: int) -> dict:
    """Compare this project's loader with timm's on `folder`/val with the published recipe, one epoch per round."""
    ours = own_loader(folder, settings, workers)
    library = create_loader(
        create_dataset("", folder, split="val"),
        (3, settings.img_size, settings.img_size),
        settings.batch_size,
        is_training=True,
        auto_augment=POLICY,
        re_prob=ERASING,
        re_mode="pixel",
        num_workers=workers,
        pin_memory=settings.device == "cuda",
        device=torch.device(settings.device),
        persistent_workers=workers > 0,
        **RECIPE,
    )
    if len(library) != len(ours):
        raise UserError(f"--loader {folder}: timm's loader and ours find different numbers of images")
    epochs = count()
    epoch_of = {
        "ours": lambda: [batch.images.sum() for batch in ours.epoch(next(epochs))],
        "timm": lambda: [images.sum() for images, _ in library],
    }
    seconds = time_in_turns(epoch_of, rounds, settings.device)
    images = len(ours) * settings.batch_size
    rates = {who: images / statistics.median(times) for who, times in seconds.items()}
    ratio = speed_ratio(seconds, "ours", "timm")
    print("images/s: " + ", ".join(f"{who} {rate:.1f}" for who, rate in rates.items()) + f"; ours / timm {ratio:.2f}")
    return {"loader": {"workers": workers, "images": images, "images_per_s": rates, "ratio": ratio}}


def own_loader(folder: str, settings: Settings, workers: int) -> TrainLoader:
    """Build this project's training loader on `folder`/val."""
    dataset = build_dataset("FOLDER", folder, "val")
    samples = KeyedImages(
        dataset, train_transform(settings.img_size, aa=POLICY, **RECIPE), erasing=RandomErasing(ERASING)
    )
    sampler = KeyedSampler(len(dataset), settings.batch_size, seed=0)
    dist = Distributed(device=torch.device(settings.device))
    return TrainLoader(samples, sampler, dist, workers, settings.device == "cuda")


def compare_exactness(labels: Sequence[str], folder: str, settings: Settings) -> dict:
    """Compare half precision with float32 for each contender and seed, starting from the same weights.

    "logit_error" is the L2 norm of the difference between the logits, divided by the norm of the float32 logits.
    "loss_gap" is the mean absolute difference between the training losses over `STEPS` steps on the same batches of
    `folder`/val.
    """
    if settings.dtype == "float32":
        raise UserError("--exactness needs --dtype bfloat16 or float16, to compare with float32")
    loader = own_loader(folder, settings, workers=0)
    batches = list(islice((batch for epoch in count() for batch in loader.epoch(epoch)), STEPS))
    print(f"{'model, against float32':32}{'logits':>24}{'losses':>24}")
    rows = {}
    for label in labels:
        half = parse_label(label, settings)
        full = replace(half, dtype="float32")
        rows[label] = row = {"logit_error": [], "loss_gap": []}
        for seed in SEEDS:
            (logits, losses), (exact, expected) = (outputs(own, seed, batches) for own in (half, full))
            row["logit_error"].append(((logits - exact).norm() / exact.norm()).item())
            row["loss_gap"].append((losses - expected).abs().mean().item())
        cells = (" ".join(f"{value:.4f}" for value in values) for values in row.values())
        print(f"{label:32}" + "".join(f"{cell:>24}" for cell in cells), flush=True)
    return {"exactness": rows}


def outputs(settings: Settings, seed: int, batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    """Return the logits of the first batch before training, and the loss of one training step per batch.

    The weights depend on the seed. The learning rate grows linearly to `RATE`.
    """
    torch.manual_seed(seed)
    runner = Runner(settings)
    runner.images = batches[0].images
    runner.model.eval()
    logits = runner.inference().float()
    runner.model.train()
    losses = []
    for step, batch in enumerate(batches, 1):
        runner.optimizer.param_groups[0]["lr"] = RATE * step / len(batches)
        runner.images, runner.targets = batch.images, batch.targets % runner.model.num_classes
        losses.append(runner.training().detach())
    return logits, torch.stack(losses)


if __name__ == "__main__":
    run_cli(main)
