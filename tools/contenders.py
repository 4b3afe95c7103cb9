"""Settings of models to compare in speed and memory, and the measurements; each model runs in its own process."""

import multiprocessing
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import models
from tools.export import ANY_BATCH, in_onnxruntime, to_onnx
from training.precision import set_up_device
from utils import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Settings that a model's label may have: plain and onnx as a prefix, the others as suffixes.
OWN_SETTINGS = {name: {"dtype": name} for name in DTYPES} | {
    "compile": {"compile": True},
    "plain": {"cpu_kernels": False},
    "onnx": {"onnx": True},
}

Seconds = dict[str, list[float]]  # name -> seconds in each round


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement. Half precision is autocast with float32 weights, as in training."""

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    cpu_kernels: bool = True
    onnx: bool = False  # run in onnxruntime
    batch_size: int = 16
    img_size: int = 224
    arch: str = ""  # the model, if one is measured

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.dtype != "float32")

    def build(self) -> nn.Module:
        """Build the model with random weights, and without stochastic depth, because its rate differs by model."""
        models.set_cpu_kernels(self.cpu_kernels)
        model = models.create_model(self.arch, 1000, (self.img_size, self.img_size), {})
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return model.to(self.device)


def parse_label(label: str, settings: Settings) -> Settings:
    """Parse [plain:|onnx:]NAME[@SETTING[,SETTING...]]; raises UserError for an unknown setting."""
    prefix, _, rest = label.rpartition(":")
    arch, *words = re.split("[@,]", rest)
    for word in (*words, prefix) if prefix else words:
        if word not in OWN_SETTINGS:
            raise UserError(f"{label}: unknown setting {word!r}; choose from {', '.join(OWN_SETTINGS)}")
        settings = replace(settings, **OWN_SETTINGS[word])
    return replace(settings, arch=arch)


class Runner:
    """A model with everything needed for a training step and for inference."""

    def __init__(self, settings: Settings):
        self._memory_before = resident_peak()
        self.settings = settings
        set_up_device(torch.device(settings.device))
        self.model = settings.build()
        self.forward = self.model
        if settings.onnx:
            shape = (3, settings.img_size, settings.img_size)
            try:
                self.forward = in_onnxruntime(to_onnx(self.model.eval(), shape, ANY_BATCH))
            except ImportError as error:
                raise UserError(f"onnx:NAME: run pip install onnx onnxruntime onnxscript ({error})") from error
        if settings.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(settings.device, enabled=settings.dtype == "float16")
        self.images = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size, device=settings.device)
        self.targets = torch.randint(self.model.num_classes, (settings.batch_size,), device=settings.device)

    def training(self) -> Tensor:
        """Run forward, cross-entropy, backward and AdamW; returns the loss."""
        with self.settings.autocast():
            loss = F.cross_entropy(self.forward(self.images).float(), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    def inference(self) -> Tensor:
        """Run the forward pass; returns the logits."""
        with torch.inference_mode(), self.settings.autocast():
            return self.forward(self.images)

    def seconds(self, part: str) -> float:
        """Time the method named `part`, with the model in the corresponding mode."""
        self.model.train(part == "training")
        return seconds_of(getattr(self, part), self.settings.device)

    def peak_memory(self) -> float:
        """Peak memory in MiB: allocated by PyTorch on CUDA; on a CPU, the process's growth since before the model."""
        if self.settings.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resident_peak() - self._memory_before


def resident_peak() -> float:
    """The peak resident memory of this process in MiB; nan except on Linux."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024 if status.exists() else float("nan")


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Time one call of `run`, until the device has finished its work."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    began = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - began


def time_in_turns(runs: Mapping[str, Callable[[], object]], rounds: int, device: str) -> Seconds:
    """Time each function once per round, in turns; see `take_turns`."""
    return take_turns({name: partial(seconds_of, run, device) for name, run in runs.items()}, rounds)


def take_turns(runs: Mapping[str, Callable[[], float]], rounds: int) -> Seconds:
    """Warm up, then call each function once per round; returns their results, which are seconds.

    Every other round has the opposite order, so that other load on the machine slows all of them equally.
    """
    for run in runs.values():
        run()
    seconds: Seconds = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seconds[name].append(runs[name]())
    return seconds


def speed_ratio(seconds: Seconds, one: str, other: str) -> float:
    """The speed of `one` relative to `other`: the ratio of the medians."""
    return statistics.median(seconds[other]) / statistics.median(seconds[one])


def measure(
    contenders: Mapping[str, Settings], rounds: int, parts: Sequence[str]
) -> Iterator[tuple[str, Seconds, dict[str, float]]]:
    """Yield each part with its seconds and peak memory in MiB by label: inference, then training (more memory).

    Each model has its own process because memory that other models have freed would speed up the next one.
    """
    memory: dict[str, float] = {}

    def run(label: str, part: str) -> float:
        seconds, memory[label] = pools[label].submit(_measure, contenders[label], part).result()
        return seconds

    with ExitStack() as stack:
        spawn, ignore_interrupt = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
        pools = {
            label: stack.enter_context(ProcessPoolExecutor(1, spawn, signal.signal, ignore_interrupt))
            for label in contenders
        }
        for part in sorted(parts):
            yield part, take_turns({label: partial(run, label, part) for label in contenders}, rounds), memory


def _measure(settings: Settings, part: str) -> tuple[float, float]:
    """Return seconds and peak memory; runs in the model's process."""
    runner = _runner(settings)
    return runner.seconds(part), runner.peak_memory()


_runner = cache(Runner)  # build the model once per process
