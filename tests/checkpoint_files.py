"""A small checkpoint with everything that a run saves, and how one is refused."""

import argparse
import pathlib

import pytest
import torch
from torch import nn

from runtime.checkpoints import load
from utils import UserError


def tensors():
    torch.manual_seed(0)
    return {
        "head.weight": torch.randn(10, 16),
        "head.bias": torch.zeros(10),
        "norm.steps": torch.tensor(3),
        "half": torch.randn(5, dtype=torch.bfloat16),
        "gate": torch.randn(3, 2, dtype=torch.complex64),
    }


def checkpoint(epoch=3, step=0):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {
        "model": tensors(),
        "model_ema": {k: v + 1 for k, v in tensors().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": step,
        "meters": {"loss": 2.5},
        "best_acc1": 71.5,
        "best_epoch": 2,
        "arch": "spectformer_xs",
        "model_kwargs": {"depth": 4},
        "num_classes": 10,
        "input_size": [32, 32],
        "mean": [0.5],
        "std": [0.5],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "class_names": ["a", "b"],
        "args": {"lr": 1e-3, "output": None},
        "version": {"torch": str(torch.__version__)},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refusal(path):
    """The message with which `path` is refused: one line that names it and gives a reason."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert len(message) < len(str(path)) + 300
    assert "Re-running" not in message and "Please use" not in message
    return message.removeprefix(f"{path}: ")


def deit_args():
    return argparse.Namespace(model="svt_s", lr=5e-4, output_dir=pathlib.PosixPath("out"), amp=True)
