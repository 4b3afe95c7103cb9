"""Whole models: training step, inference, latency of one image, peak memory."""

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from models.base import ImageModel
from models.flops import flops_by_kind
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate
from utils import UserError

from .contenders import LATENCY_REPEATS, Contender, Runner
from .elsewhere import RunnerElsewhere, peak_memory
from .layers import training_run
from .settings import Settings
from .stopwatch import matmul_rate, speed_ratio, take_turns

PARTS = ("training", "inference", "latency", "memory", "graph-breaks", "spectral-share")


def compare_models(labels: Sequence[str], settings: Settings, rounds: int, parts: Sequence[str]) -> dict:
    """Measure `parts` of all contenders: figures for each model, and ratios of one model to another."""
    contenders = [Contender.parse(label, settings) for label in labels]
    if any(contender.model.startswith("onnx:") for contender in contenders) and (
        settings.device != "cpu" or not {*parts} <= {"inference", "latency"}
    ):
        raise UserError("onnx:NAME is measured with --parts inference latency, on the CPU")
    rows: dict[str, dict] = {contender.label: {} for contender in contenders}
    for contender in contenders:
        row = rows[contender.label]
        row.update(_describe(contender))
        for part in ("training", "inference") if "memory" in parts else ():
            with RunnerElsewhere(contender) as runner:
                row[f"{part}_peak_mib"] = round(runner.call(peak_memory, part), 1)
    result: dict = {"settings": asdict(settings), "rounds": rounds, "models": rows, "ratios": {}}
    with ExitStack() as stack:
        # On CUDA all are in this process and share what memory PyTorch holds: each for itself would hold its peak.
        runners: list[Runner | RunnerElsewhere] = [
            Runner(contender) if settings.device == "cuda" else stack.enter_context(RunnerElsewhere(contender))
            for contender in contenders
        ]
        # Training last: it leaves memory with the C library that a process which only infers has to ask for.
        for part in ("inference", "latency", "training"):
            if part in parts:
                runs = {runner.contender.label: runner.task(part) for runner in runners}
                seconds = take_turns(runs, rounds, settings.device)
                result["ratios"][part] = {a: {b: speed_ratio(seconds, a, b) for b in runs} for a in runs}
                for label, times in seconds.items():
                    rows[label] |= figures(part, times, settings.batch_size)
        for runner in runners:
            row = rows[runner.contender.label]
            if "training" in parts:
                macs = 3e9 * row["gmacs"] * row["training_images_per_s"]  # the backward pass is two forward passes
                row["utilisation"] = macs / matmul_rate(runner.contender.settings)
            if "training" in parts and "spectral-share" in parts:
                row["spectral_share"] = runner.call(spectral_seconds, rounds) / (row["training_ms"] / 1000)
            if "graph-breaks" in parts:
                row["graph_breaks"] = runner.call(graph_breaks)
    return result


def _describe(contender: Contender) -> dict:
    """Size and arithmetic; a plain model's is that of ours. Useful is all but our models' spectral mixers."""
    model = replace(contender, model=contender.model.removeprefix("plain:")).build()
    kinds = flops_by_kind(model, contender.settings.img_size)
    spectral = kinds["spectral"] if isinstance(model, ImageModel) else 0
    return {
        "settings": asdict(contender.settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "gmacs": sum(kinds.values()) / 1e9,
        "useful_gmacs": (sum(kinds.values()) - spectral) / 1e9,
    }


def figures(part: str, times: list[float], batch_size: int) -> dict[str, float]:
    """Median and quartiles in milliseconds, for one image or one batch, and images a second."""
    scale = 1000 / LATENCY_REPEATS if part == "latency" else 1000
    quartiles = [scale * t for t in (statistics.quantiles(times, n=4) if len(times) > 1 else times * 3)]
    median = scale * statistics.median(times)
    figures = {f"{part}_ms": median, f"{part}_quartiles_ms": [quartiles[0], quartiles[2]]}
    if part != "latency":
        figures[f"{part}_images_per_s"] = 1000 * batch_size / median
    return figures


def graph_breaks(runner: Runner) -> int:
    """Places where a compiled graph of the model ends and another begins."""
    return torch._dynamo.explain(runner.model.forward)(runner.images).graph_break_count


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
