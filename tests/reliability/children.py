"""Small cases that tests run in forked children: many of them in one process."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from inputs.images import array_dataset
from inputs.loader import EvalLoader, KeyedImages
from inputs.transforms import eval_transform
from runtime import checkpoints
from runtime.cli import run_cli
from runtime.processes import close_distributed, init_distributed
from training.classification import evaluate
from training.precision import Precision
from utils import UserError


def evaluate_sizes(sizes: Sequence[int], batches: Sequence[int], report: str) -> None:
    """{"size batch": [correct1, correct5, images]} of a fixed model, by classification's `evaluate` in this job."""
    dist = init_distributed("cpu")
    images = np.random.RandomState(0).randint(0, 256, (max(sizes), 8, 8, 3)).astype(np.uint8)
    labels = np.random.RandomState(1).randint(0, 10, max(sizes))
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8 * 8 * 3, 10)).double()
    transform = eval_transform((8, 8), crop_pct=1.0)
    counts = {}
    for size in sizes:
        dataset = KeyedImages(array_dataset("noise", images[:size], labels[:size], list("0123456789")), transform, 0)
        for batch in batches:
            loader = EvalLoader(dataset, batch, dist)
            found = evaluate(model, loader, dist, Precision(dist.device, torch.float64, None))
            counts[f"{size} {batch}"] = [found["correct1"], found["correct5"], found["images"]]
    if dist.is_main:
        Path(report).write_text(json.dumps(counts))
    close_distributed()


def write_again_and_again(path: str) -> None:
    """Replace a checkpoint that says its own number, until this process is killed."""
    for number in range(10**6):
        checkpoints.save(path, {"model": {"weight": torch.full((64, 64), float(number))}, "epoch": number})


def run(case: str, **arguments: int) -> None:
    """Run a function of this module as a script's `main`."""
    run_cli(lambda argv: globals()[case](**arguments))


def exchange() -> None:
    dist = init_distributed("cpu")
    total = dist.sum(torch.tensor([1.5, dist.rank])).tolist()
    print(json.dumps([dist.rank, dist.is_main, total, dist.gather_objects({"from": dist.rank})]))


def fail_on_one_rank(failing: int) -> None:
    dist = init_distributed("cpu")
    if dist.rank == failing:
        raise UserError("only here")
    for _ in range(10_000):
        dist.barrier()
        time.sleep(0.005)


def one_step() -> None:
    dist = init_distributed("cpu")
    model = torch.nn.BatchNorm1d(1)
    parallel = dist.wrap(model)
    parallel(torch.tensor([[0.0], [2.0 + dist.rank]])).square().sum().backward()
    print(json.dumps([model.running_mean.item(), model.bias.grad.item(), parallel.gradient_as_bucket_view]))
