#!/usr/bin/env python
"""Measure models side by side: training step, inference, latency of one image, peak memory.

    python tools/benchmark.py svt_h_s plain:svt_h_s pvt_v2_b2 deit_small_patch16_224
    python tools/benchmark.py --layers                    the mixers and the wavelet transform alone
    python tools/benchmark.py --loader DIR                the input pipeline against timm's, on DIR/val
    python tools/benchmark.py --suite cuda --json FILE    all that docs/performance.md says of a GPU

A contender is any model of timm's registry, ours included, or "plain:NAME", our model in its plain
formulation (tools/plain_models.py). Settings of its own may follow, NAME@bfloat16,compile,channels-last, or
float32, float16, eager, contiguous. The contenders of a run take turns, A B A B ..., so that what else the
machine does hits all alike; figures are medians over the rounds, a ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.data import create_dataset, create_loader
from torch import Tensor, nn

from datasets import KeyedDataset, KeyedSampler, LoaderSettings, TrainLoader, build_dataset, build_transform
from models.base import ImageModel
from models.flops import flops_by_kind
from models.mixers import build_mixer
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate
from models.wavelet import DTCWT
from tools import plain_models
from utils import Distributed, UserError, atomic_write, run_cli

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PARTS = ("training", "inference", "latency", "memory", "graph-breaks", "spectral-share")
WARM_UP = {"cpu": 1, "cuda": 5}
LATENCY_REPEATS = 5
LAYER_GRIDS = (7, 14, 28, 32, 56, 64, 112, 128)
MIB = 2**20

# What docs/performance.md reports: for each suite the command lines of its runs, each a process of its own.
PEERS = "pvt_v2_b2 deit_small_patch16_224 swin_tiny_patch4_window7_224"
ALL_AT_ONCE = f"svt_h_s plain:svt_h_s spectformer_h_s plain:spectformer_h_s spectformer_xs {PEERS}"
VARIANTS = " ".join(
    [f"spectformer_{size}" for size in ("ti", "xs", "s", "b")]
    + [f"{family}_{size}" for family in ("spectformer_h", "svt_h") for size in ("s", "b", "l")]
)
FAST_CUDA = "--device cuda --dtype bfloat16 --channels-last --batch-size 256 --rounds 20"
SUITES = {
    "cpu": (
        "svt_h_s plain:svt_h_s pvt_v2_b2 --rounds 7",
        "spectformer_h_s plain:spectformer_h_s pvt_v2_b2 --rounds 7",
        "spectformer_xs deit_small_patch16_224 --rounds 7",
        "--layers --rounds 9",
        f"{ALL_AT_ONCE} --rounds 5 --parts inference training",
    ),
    "cuda": (
        f"svt_h_s spectformer_h_s spectformer_xs {PEERS} plain:svt_h_s@float16,eager,contiguous"
        f" {FAST_CUDA} --compile --parts {' '.join(PARTS)}",
        f"svt_h_s spectformer_h_s spectformer_xs {PEERS} {FAST_CUDA}",
    ),
    "cuda-variants": (f"{VARIANTS} {FAST_CUDA} --compile --parts training graph-breaks",),
    "cuda-layers": (f"--layers {FAST_CUDA}",),
}


# ------------------------------------------------------------------------------------------------- contenders


@dataclass(frozen=True)
class Settings:
    """How a model is run. Half precision is autocast over float32 weights, as in training."""

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False
    batch_size: int = 16
    img_size: int = 224

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.dtype != "float32")


OWN_SETTINGS = {
    **{name: {"dtype": name} for name in DTYPES},
    "compile": {"compile": True},
    "eager": {"compile": False},
    "channels-last": {"channels_last": True},
    "contiguous": {"channels_last": False},
}


@dataclass(frozen=True)
class Contender:
    """A model to measure and how to run it; `label` is what the user wrote."""

    label: str
    model: str
    settings: Settings

    @classmethod
    def parse(cls, label: str, settings: Settings) -> Contender:
        """Read [plain:]NAME[@SETTING[,SETTING...]]; UserError for a name or setting that does not exist."""
        model, _, words = label.partition("@")
        for word in words.split(",") if words else ():
            if word not in OWN_SETTINGS:
                raise UserError(f"{label}: unknown setting {word!r}; there are {', '.join(OWN_SETTINGS)}")
            settings = replace(settings, **OWN_SETTINGS[word])
        known = plain_models.BUILDERS if model.startswith("plain:") else timm.list_models()
        if model.removeprefix("plain:") not in known:
            raise UserError(f"{label}: no such model; ours are {VARIANTS}, each also as plain:NAME")
        return cls(label, model, settings)

    def build(self) -> nn.Module:
        """The model with random weights, on its device."""
        size = {"img_size": self.settings.img_size}
        if self.model.startswith("plain:"):
            model = plain_models.create(self.model.removeprefix("plain:"), **size)
        else:
            fixed = timm.get_pretrained_cfg_value(self.model, "fixed_input_size")
            model = timm.create_model(self.model, **(size if fixed else {}))
        return model.to(self.settings.device, memory_format=self.settings.memory_format)


class Runner:
    """A contender with all that a training step and an inference need."""

    def __init__(self, contender: Contender):
        self.contender = contender
        self.settings = settings = contender.settings
        self.label = contender.label
        self.model = contender.build()
        self.call = torch.compile(self.model) if settings.compile else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(settings.device, enabled=settings.dtype == "float16")
        shape = (settings.batch_size, 3, settings.img_size, settings.img_size)
        images = torch.randn(shape, device=settings.device)
        self.images = images.contiguous(memory_format=settings.memory_format)
        self.targets = torch.randint(1000, (settings.batch_size,), device=settings.device)

    def training(self) -> None:
        """Forward, cross-entropy, backward, AdamW."""
        with self.settings.autocast():
            loss = F.cross_entropy(self.call(self.images), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def inference(self) -> None:
        with torch.inference_mode(), self.settings.autocast():
            self.call(self.images)

    def latency(self) -> None:
        with torch.inference_mode(), self.settings.autocast():
            for _ in range(LATENCY_REPEATS):
                self.call(self.images[:1])

    def task(self, part: str) -> Callable[[], None]:
        """The method called `part`, which puts the model into the mode it needs."""

        def run() -> None:
            self.model.train(part == "training")
            getattr(self, part)()

        return run


# -------------------------------------------------------------------------------------------------- stopwatch

Seconds = dict[str, list[float]]  # of each contestant, in each round


def measure(run: Callable[[], object], device: str) -> float:
    """Seconds `run` takes: device events on CUDA, the wall clock on a CPU."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    begin_time = time.perf_counter()
    run()
    return time.perf_counter() - begin_time


def take_turns(runs: dict[str, Callable[[], object]], rounds: int, device: str) -> Seconds:
    """Time all runs in every round, after warming up; every other round goes through them backwards."""
    for run in runs.values():
        for _ in range(WARM_UP[device]):
            run()
    seconds: Seconds = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seconds[name].append(measure(runs[name], device))
    return seconds


def speed_ratio(seconds: Seconds, one: str, other: str) -> float:
    """How many times as fast as `other` `one` is: the median of the rounds' ratios."""
    return statistics.median(b / a for a, b in zip(seconds[one], seconds[other], strict=True))


def matmul_rate(settings: Settings) -> float:
    """Multiply-adds a second of a large matrix product: the peak that utilisation is a fraction of."""
    side = 8192 if settings.device == "cuda" else 1024
    one, other = torch.randn(2, side, side, device=settings.device, dtype=DTYPES[settings.dtype])
    return side**3 / statistics.median(take_turns({"": lambda: one @ other}, 10, settings.device)[""])


# ------------------------------------------------------------------------------------------------ peak memory


def peak_memory(contender: Contender, training: bool, threads: int) -> float:
    """MiB that building the model and two training steps, or inferences, add to a fresh process.

    On CUDA it is what PyTorch allocated at most.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak, args=(sender, contender, training, threads))
    child.start()
    sender.close()
    try:
        return receiver.recv() / MIB
    except EOFError:
        raise UserError(f"{contender.label}: the process that measures its memory died") from None
    finally:
        child.join()


def _send_peak(sender, contender: Contender, training: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    before = _resident_peak()
    runner = Runner(contender)
    run = runner.task("training" if training else "inference")
    run()
    run()
    on_device = contender.settings.device == "cuda"
    sender.send(torch.cuda.max_memory_allocated() if on_device else _resident_peak() - before)


def _resident_peak() -> int:
    """The most bytes this process has had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there includes the process this one was started by
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


# ----------------------------------------------------------------------------------------------------- models


def compare_models(labels: Sequence[str], settings: Settings, rounds: int, parts: Sequence[str]) -> dict:
    """Measure `parts` of all contenders: figures for each model, and ratios of one model to another."""
    contenders = [Contender.parse(label, settings) for label in labels]
    rows: dict[str, dict] = {contender.label: {} for contender in contenders}
    if "memory" in parts:  # first, while this process is small itself
        for contender in contenders:
            for part, training in (("training", True), ("inference", False)):
                peak = peak_memory(contender, training, torch.get_num_threads())
                rows[contender.label][f"{part}_peak_mib"] = round(peak, 1)
    runners = [Runner(contender) for contender in contenders]
    for runner in runners:
        rows[runner.label].update(_describe(runner))
    result: dict = {"settings": asdict(settings), "rounds": rounds, "models": rows, "ratios": {}}
    # Training last: it leaves memory with the C library that a process which only infers has to ask for.
    for part in ("inference", "latency", "training"):
        if part in parts:
            runs = {runner.label: runner.task(part) for runner in runners}
            seconds = take_turns(runs, rounds, settings.device)
            result["ratios"][part] = {a: {b: speed_ratio(seconds, a, b) for b in runs} for a in runs}
            for runner in runners:
                rows[runner.label] |= _figures(part, seconds[runner.label], settings.batch_size)
    for runner in runners:
        row = rows[runner.label]
        if "training" in parts:
            macs = 3e9 * row["gmacs"] * row["training_images_per_s"]  # the backward pass is two forward passes
            row["utilisation"] = macs / matmul_rate(runner.settings)
        if "training" in parts and "spectral-share" in parts:
            row["spectral_share"] = spectral_seconds(runner, rounds) / (row["training_ms"] / 1000)
        if "graph-breaks" in parts:
            row["graph_breaks"] = torch._dynamo.explain(runner.model)(runner.images).graph_break_count
    return result


def _describe(runner: Runner) -> dict:
    """Size and arithmetic; a plain model's is that of ours. Useful is all but our models' spectral mixers."""
    plain = runner.contender.model.startswith("plain:")
    model = replace(runner.contender, model=runner.contender.model[6:]).build() if plain else runner.model
    kinds = flops_by_kind(model, runner.settings.img_size)
    spectral = kinds["spectral"] if isinstance(model, ImageModel) else 0
    return {
        "settings": asdict(runner.settings),
        "parameters": sum(p.numel() for p in runner.model.parameters()),
        "gmacs": sum(kinds.values()) / 1e9,
        "useful_gmacs": (sum(kinds.values()) - spectral) / 1e9,
    }


def _figures(part: str, times: list[float], batch_size: int) -> dict[str, float]:
    """Median and quartiles in milliseconds, for one image or one batch, and images a second."""
    scale = 1000 / LATENCY_REPEATS if part == "latency" else 1000
    quartiles = [scale * t for t in (statistics.quantiles(times, n=4) if len(times) > 1 else times * 3)]
    median = scale * statistics.median(times)
    figures = {f"{part}_ms": median, f"{part}_quartiles_ms": [quartiles[0], quartiles[2]]}
    if part != "latency":
        figures[f"{part}_images_per_s"] = 1000 * batch_size / median
    return figures


def spectral_seconds(runner: Runner, rounds: int) -> float:
    """Seconds of a training step that the spectral mixers take, each measured alone on its own input."""
    inputs: dict[nn.Module, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, args: inputs.update({module: args[0].detach()}))
        for module in runner.model.modules()
        if isinstance(module, (SpectralGate, ScatteringMixer))
    ]
    runner.model.train()
    with torch.no_grad(), runner.settings.autocast():
        runner.model(runner.images)
    for hook in hooks:
        hook.remove()
    runs = {str(i): training_run(*item, runner.settings) for i, item in enumerate(inputs.items())}
    seconds = take_turns(runs, rounds, runner.settings.device)
    return sum(statistics.median(times) for times in seconds.values())


# ----------------------------------------------------------------------------------------------------- layers


def training_run(layer: nn.Module, x: Tensor, settings: Settings, *args: object) -> Callable[[], None]:
    """Forward and backward of one layer."""
    call = torch.compile(layer) if settings.compile else layer
    x = x.requires_grad_()
    with torch.no_grad(), settings.autocast():
        gradient = torch.randn_like(call(x, *args))

    def run() -> None:
        with settings.autocast():
            y = call(x, *args)
        y.backward(gradient)
        x.grad = None
        layer.zero_grad()

    return run


def inference_run(layer: nn.Module, x: Tensor, settings: Settings, *args: object) -> Callable[[], None]:
    call = torch.compile(layer) if settings.compile else layer

    def run() -> None:
        with torch.inference_mode(), settings.autocast():
            call(x, *args)

    return run


class WaveletPair(nn.Module):
    """Wavelet transform and inverse of a (B, H, W, C) grid."""

    def __init__(self, side: int):
        super().__init__()
        self.wavelet = DTCWT((side, side))

    def forward(self, x: Tensor) -> Tensor:
        return self.wavelet.inverse(*self.wavelet(x), (x.shape[1], x.shape[2]))


class LibraryWaveletPair(nn.Module):
    """The same on (B, C, H, W), by pytorch_wavelets."""

    def __init__(self):
        super().__init__()
        from pytorch_wavelets import DTCWTForward, DTCWTInverse

        self.xfm = DTCWTForward(J=1, biort="near_sym_b", qshift="qshift_b")
        self.ifm = DTCWTInverse(biort="near_sym_b", qshift="qshift_b")

    def forward(self, x: Tensor) -> Tensor:
        return self.ifm(self.xfm(x))


def layer_pairs(side: int, dim: int, x: Tensor) -> Iterator[tuple[str, tuple, tuple]]:
    """For each operation its name, our layer and the plain one, each with the arguments of its call."""
    grid, tokens = (side, side), x.flatten(1, 2)
    heads = dim // 32
    gate = build_mixer("spectral", dim, grid, heads)
    yield "spectral", (gate, x), (plain_models.SpectralGate(dim, grid), tokens, grid)
    for mixing in ("channel", "channel_token"):
        ours = build_mixer(f"scattering_{mixing}", dim, grid, heads)
        yield f"scattering_{mixing}", (ours, x), (plain_models.Scattering(dim, grid, mixing), tokens, grid)
    yield "wavelet", (WaveletPair(side), x), (LibraryWaveletPair(), x.permute(0, 3, 1, 2).contiguous())
    if x.shape[0] * heads * side**4 * 4 <= 2**31:  # the plain attention's matrix stays below 2 GiB
        attention = build_mixer("attention", dim, grid, heads)
        yield "attention", (attention, x), (plain_models.Attention(dim, heads), tokens, grid)


def compare_layers(grids: Sequence[int], dim: int, settings: Settings, rounds: int) -> dict:
    """Our layers against the plain ones on square grids; larger batches for smaller grids."""
    rows = []
    for side in grids:
        batch = max(1, settings.batch_size * 56**2 // max(side, 28) ** 2)
        x = torch.randn(batch, side, side, dim, device=settings.device)
        for name, *pair in layer_pairs(side, dim, x):
            row = {"layer": name, "grid": side, "batch": batch, "channels": dim}
            for part, make in (("training", training_run), ("inference", inference_run)):
                runs = {
                    who: make(layer.to(settings.device), data.clone(), settings, *args)
                    for who, (layer, data, *args) in zip(("ours", "plain"), pair, strict=True)
                }
                seconds = take_turns(runs, rounds, settings.device)
                row |= {f"{part}_{who}_ms": 1000 * statistics.median(seconds[who]) for who in runs}
                row[f"{part}_ratio"] = speed_ratio(seconds, "ours", "plain")
            rows.append(row)
            print(layer_line(row), flush=True)
    return {"settings": asdict(settings), "rounds": rounds, "layers": rows}


# ----------------------------------------------------------------------------------------------------- loader

RECIPE = {"color_jitter": 0.4, "interpolation": "bicubic"}  # of both loaders, with the following
AUGMENT, ERASE = "rand-m9-mstd0.5-inc1", 0.25


def compare_loaders(folder: str, settings: Settings, workers: int, rounds: int) -> dict:
    """Training batches of `folder`/val by the published recipe, ours and timm's, an epoch a round."""
    ours, library = _own_loader(folder, settings, workers), _timm_loader(folder, settings, workers)
    epochs = cycle(range(1000))
    runs = {
        "ours": lambda: [batch.images.sum() for batch in ours.epoch(next(epochs))],
        "timm": lambda: [images.sum() for images, _ in library],
    }
    images = len(ours) * settings.batch_size
    if len(library) != len(ours):
        raise UserError(f"{folder}: timm finds other images there than we do")
    seconds = take_turns(runs, rounds, settings.device)
    figures = {who: images / statistics.median(times) for who, times in seconds.items()}
    ratio = speed_ratio(seconds, "ours", "timm")
    return {
        "settings": asdict(settings),
        "rounds": rounds,
        "loader": {"workers": workers, "images": images, "images_per_s": figures, "ratio": ratio},
    }


def _own_loader(folder: str, settings: Settings, workers: int) -> TrainLoader:
    dataset = build_dataset("FOLDER", folder, train=False)
    transform = build_transform(True, settings.img_size, aa=AUGMENT, reprob=ERASE, **RECIPE)
    pin = settings.device == "cuda"
    dist = Distributed(device=torch.device(settings.device))
    sampler = KeyedSampler(len(dataset), settings.batch_size, seed=0)
    loader_settings = LoaderSettings(settings.batch_size, workers, pin, dist)
    return TrainLoader(KeyedDataset(dataset, transform, seed=0), sampler, loader_settings)


def _timm_loader(folder: str, settings: Settings, workers: int):
    return create_loader(
        create_dataset("", folder, split="val"),
        (3, settings.img_size, settings.img_size),
        settings.batch_size,
        is_training=True,
        auto_augment=AUGMENT,
        re_prob=ERASE,
        re_mode="pixel",
        num_workers=workers,
        pin_memory=settings.device == "cuda",
        device=torch.device(settings.device),
        persistent_workers=workers > 0,
        **RECIPE,
    )


# ----------------------------------------------------------------------------------------------------- report

COLUMNS = (  # heading, width, digits, key and divisor
    ("Mparam", 6, 1, "parameters", 1e6),
    ("GMAC", 5, 1, "gmacs", 1),
    ("train/s", 8, 2, "training_images_per_s", 1),
    ("infer/s", 8, 2, "inference_images_per_s", 1),
    ("ms/img", 6, 1, "latency_ms", 1),
    ("train MiB", 9, 0, "training_peak_mib", 1),
    ("infer MiB", 9, 0, "inference_peak_mib", 1),
    ("of peak", 7, 2, "utilisation", 1),
    ("spectral", 8, 2, "spectral_share", 1),
    ("breaks", 6, 0, "graph_breaks", 1),
)


def model_table(result: dict) -> str:
    """A table of the models' figures, one of ratios for each part that has them."""
    rows = result["models"]
    letters = {label: chr(ord("A") + i) for i, label in enumerate(rows)}
    columns = [column for column in COLUMNS if any(column[3] in row for row in rows.values())]
    lines = [f"{letter}  {label}" for label, letter in letters.items()]
    lines += ["", "   " + "".join(f"{heading:>{width + 1}}" for heading, width, *_ in columns)]
    for label, row in rows.items():
        cells = [
            f"{row[key] / divisor:{width + 1}.{digits}f}" if key in row else " " * (width + 1)
            for _, width, digits, key, divisor in columns
        ]
        lines.append(f"{letters[label]}  " + "".join(cells))
    for part, table in result["ratios"].items():
        lines += ["", f"{part}: row / column (more than 1: the row is faster)"]
        lines.append("   " + "".join(f"{letters[label]:>7}" for label in table))
        for label, row in table.items():
            lines.append(f"{letters[label]}  " + "".join(f"{ratio:7.2f}" for ratio in row.values()))
    return "\n".join(lines)


LAYER_HEADING = (
    f"{'layer':24}{'grid':>5}{'batch':>6}   {'fwd+bwd ms':>10}{'plain':>10}{'ratio':>7}"
    f"   {'forward ms':>10}{'plain':>10}{'ratio':>7}"
)


def layer_line(row: dict) -> str:
    figures = "".join(
        f"   {row[f'{part}_ours_ms']:10.2f}{row[f'{part}_plain_ms']:10.2f}{row[f'{part}_ratio']:7.2f}"
        for part in ("training", "inference")
    )
    return f"{row['layer']:24}{row['grid']:5}{row['batch']:6}{figures}"


def machine() -> dict:
    """Where and with what the figures were measured."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "cuda": torch.version.cuda,
    }


# ----------------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="[plain:]NAME[@SETTING,...]")
    add("--layers", action="store_true", help="the mixers and the wavelet transform alone")
    add("--loader", metavar="DIR", help="our input pipeline against timm's on DIR/val")
    add("--suite", choices=SUITES, help="a set of runs, one after the other")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dtype", choices=DTYPES, default="float32", help="of the arithmetic, not the weights")
    add("--compile", action="store_true", help="torch.compile")
    add("--channels-last", action="store_true")
    add("--batch-size", type=int, default=16)
    add("--img-size", type=int, default=224)
    add("--rounds", type=int, default=5)
    add("--parts", nargs="+", choices=PARTS, default=PARTS[:4], help="what to measure")
    add("--grids", nargs="+", type=int, default=LAYER_GRIDS, help="of --layers")
    add("--channels", type=int, default=64, help="of --layers")
    add("--workers", type=int, default=2, help="of --loader")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--json", type=Path, help="write all figures, with machine and versions, to this file")
    return parser


def run(args: argparse.Namespace) -> dict:
    """One run: its figures, printed and returned."""
    settings = Settings(args.device, args.dtype, args.compile, args.channels_last, args.batch_size, args.img_size)
    if args.layers:
        print(LAYER_HEADING)
        return compare_layers(args.grids, args.channels, settings, args.rounds)
    if args.loader:
        result = compare_loaders(args.loader, settings, args.workers, args.rounds)
        figures = result["loader"]
        print("images/s: " + ", ".join(f"{who} {rate:.1f}" for who, rate in figures["images_per_s"].items()))
        print(f"ours / timm: {figures['ratio']:.2f}")
        return result
    result = compare_models(args.models, settings, args.rounds, args.parts)
    print(model_table(result))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if sum(map(bool, (args.models, args.layers, args.loader, args.suite))) != 1:
        parser.error("name models to measure, or one of --layers, --loader and --suite")
    if args.rounds < 1 or args.batch_size < 1 or args.threads < 1:
        parser.error("--rounds, --batch-size and --threads are at least 1")
    torch.set_num_threads(args.threads)
    if args.suite:
        return run_suite(args.suite, args.json)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no CUDA device here")
    runs = [{"command": f"tools/benchmark.py {shlex.join(argv)}", **run(args)}]
    if args.json:
        write_report(args.json, {"machine": machine(), "runs": runs})


def run_suite(name: str, path: Path | None) -> None:
    """Every run of a suite, each in a process of its own; SystemExit with the status of one that fails."""
    runs: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder, "run.json")
        for words in SUITES[name]:
            print(f"\n$ benchmark.py {words}", flush=True)
            command = [sys.executable, __file__, *shlex.split(words), "--json", str(one)]
            if status := subprocess.run(command).returncode:
                raise SystemExit(status)
            report = json.loads(one.read_text())
            runs.append({**report["runs"][0], "command": f"tools/benchmark.py {words}"})
            if path:
                write_report(path, {"machine": report["machine"], "runs": runs})


def write_report(path: Path, report: dict) -> None:
    atomic_write(path, json.dumps(report, indent=1).encode())


if __name__ == "__main__":
    run_cli(main)
