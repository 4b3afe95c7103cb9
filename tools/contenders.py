"""Compare models in speed and memory: each runs in its own process, and they take turns."""

import multiprocessing
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Self

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

import models
from tools.export import in_onnxruntime
from training.precision import set_up_device
from utils import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Settings that may follow a contender's name.
OWN_SETTINGS = {name: {"dtype": name} for name in DTYPES} | {
    "compile": {"compile": True},
    "channels-last": {"channels_last": True},
}
WARM_UP = {"cpu": 1, "cuda": 5}

Seconds = dict[str, list[float]]  # by contender, of each round


@dataclass(frozen=True)
class Settings:
    """The settings of a measurement. Half precision is autocast with float32 weights, as in training."""

    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    channels_last: bool = False
    batch_size: int = 16
    img_size: int = 224

    def autocast(self) -> AbstractContextManager:
        return torch.autocast(self.device, DTYPES[self.dtype], enabled=self.dtype != "float32")


@dataclass(frozen=True)
class Contender:
    """A model to measure. `label` is what the user wrote; `prefix` is "", "plain" (no CPU kernels) or "onnx"."""

    label: str
    prefix: str
    arch: str
    settings: Settings

    @classmethod
    def parse(cls, label: str, settings: Settings) -> Self:
        """Read [plain:|onnx:]NAME[@SETTING[,SETTING...]].

        Raises:
            UserError: there is no such model or setting.
        """
        model, _, words = label.partition("@")
        for word in words.split(",") if words else ():
            if word not in OWN_SETTINGS:
                raise UserError(f"{label}: unknown setting {word!r}; choose from {', '.join(OWN_SETTINGS)}")
            settings = replace(settings, **OWN_SETTINGS[word])
        prefix, _, arch = model.rpartition(":")
        if not timm.is_model(arch) or prefix not in ("", "plain", "onnx"):
            raise UserError(f"{label}: no such model; write NAME, plain:NAME or onnx:NAME, with NAME one of timm's")
        return cls(label, prefix, arch, settings)

    def build(self) -> nn.Module:
        """Build the model with random weights and without stochastic depth, whose defaults differ between models."""
        models.set_cpu_kernels(self.prefix != "plain")
        model = models.create_model(self.arch, 1000, (self.settings.img_size, self.settings.img_size), {})
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        memory_format = torch.channels_last if self.settings.channels_last else torch.contiguous_format
        return model.to(self.settings.device, memory_format=memory_format)


class Runner:
    """A contender with everything needed for a training step and for inference."""

    def __init__(self, contender: Contender):
        self._memory_before = resident_peak()
        self.settings = settings = contender.settings
        set_up_device(torch.device(settings.device))
        self.model = contender.build()
        self.forward = in_onnxruntime(self.model, settings.img_size) if contender.prefix == "onnx" else self.model
        if settings.compile:
            self.model.compile()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(settings.device, enabled=settings.dtype == "float16")
        images = torch.randn(settings.batch_size, 3, settings.img_size, settings.img_size, device=settings.device)
        self.images = images.contiguous(memory_format=torch.channels_last) if settings.channels_last else images
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

    def inference(self) -> None:
        with torch.inference_mode(), self.settings.autocast():
            self.forward(self.images)

    def seconds(self, part: str) -> float:
        """How long the method called `part` takes, with the model in the mode that it needs."""
        self.model.train(part == "training")
        return seconds_of(getattr(self, part), self.settings.device)

    def peak_memory(self) -> float:
        """MiB that the model and what has run so far added to this process at most; on CUDA, that PyTorch allocated."""
        if self.settings.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resident_peak() - self._memory_before


def resident_peak() -> float:
    """The peak resident memory of this process in MiB on Linux; nan elsewhere."""
    status = Path("/proc/self/status")
    return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024 if status.exists() else float("nan")


def seconds_of(run: Callable[[], object], device: str) -> float:
    """Seconds that `run` takes: by device events on CUDA, by the wall clock on a CPU."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def take_turns(runs: dict[str, Callable[[], float]], rounds: int, device: str) -> Seconds:
    """The seconds that each run returns, in every round, after warming up; every other round goes backwards.

    So whatever else the machine does slows all runs alike.
    """
    for run in runs.values():
        for _ in range(WARM_UP[device]):
            run()
    seconds: Seconds = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs)[:: -1 if turn % 2 else 1]:
            seconds[name].append(runs[name]())
    return seconds


def speed_ratio(seconds: Seconds, one: str, other: str) -> float:
    """The speed of `one` relative to `other`: the ratio of the medians."""
    return statistics.median(seconds[other]) / statistics.median(seconds[one])


# ---------------------------------------------------------------------------------------- a process of its own


def measure(
    contenders: Sequence[Contender], rounds: int, parts: Sequence[str]
) -> Iterator[tuple[str, Seconds, dict[str, float]]]:
    """(part, seconds, peak memory in MiB by contender) of each part. Training is last: it needs the most memory.

    Each contender has a process of its own, as a model is used. How often a process asks the system for fresh memory
    depends on what ran in it before: beside other models, those with large hidden tensors would profit from what the
    others have freed.

    Raises:
        UserError: the process of a contender died, for example because it ran out of memory.
    """
    context, ignore_interrupt = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    memory: dict[str, float] = {}

    def run(contender: Contender, part: str) -> float:
        try:
            measured = pools[contender].submit(_measure, contender, part).result()
        except BrokenProcessPool:
            raise UserError(f"{contender.label}: the process that measured it died (out of memory?)") from None
        seconds, memory[contender.label] = measured
        return seconds

    with ExitStack() as stack:
        pools = {
            contender: stack.enter_context(ProcessPoolExecutor(1, context, signal.signal, ignore_interrupt))
            for contender in contenders
        }
        for part in sorted(parts, key="training".__eq__):
            runs = {contender.label: partial(run, contender, part) for contender in contenders}
            yield part, take_turns(runs, rounds, contenders[0].settings.device), memory


def _measure(contender: Contender, part: str) -> tuple[float, float]:
    """Seconds and peak memory, in the contender's process."""
    runner = _runner(contender)
    return runner.seconds(part), runner.peak_memory()


_runner = cache(Runner)  # of this process
