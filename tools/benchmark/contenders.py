"""The models that are measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import nn

import models  # noqa: F401 (registers ours)
from models import reference
from utils import UserError

from .settings import DTYPES, Settings

LATENCY_REPEATS = 5
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
    num_classes: int = 1000

    @classmethod
    def parse(cls, label: str, settings: Settings) -> Contender:
        """Read [plain:|onnx:]NAME[@SETTING[,SETTING...]]; UserError for a name or setting that does not exist."""
        model, _, words = label.partition("@")
        for word in words.split(",") if words else ():
            if word not in OWN_SETTINGS:
                raise UserError(f"{label}: unknown setting {word!r}; there are {', '.join(OWN_SETTINGS)}")
            settings = replace(settings, **OWN_SETTINGS[word])
        known = reference.BUILDERS if model.startswith("plain:") else timm.list_models()
        if model.removeprefix("plain:").removeprefix("onnx:") not in known:
            raise UserError(
                f"{label}: no such model; ours are {', '.join(reference.BUILDERS)}, each also as plain:NAME"
            )
        return cls(label, model, settings)

    def build(self) -> nn.Module:
        """The model with random weights, on its device, without stochastic depth: the defaults of models differ."""
        size = {"img_size": self.settings.img_size}
        if self.model.startswith("plain:"):
            model = reference.create(self.model.removeprefix("plain:"), **size)
        else:
            name = self.model.removeprefix("onnx:")
            fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
            model = timm.create_model(name, **(size if fixed else {}))
        for module in model.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return model.to(self.settings.device, memory_format=self.settings.memory_format)


class Runner:
    """A contender with all that a training step and an inference need."""

    def __init__(self, contender: Contender):
        self.contender = contender
        self.settings = settings = contender.settings
        self.model = contender.build()
        self.forward = self.model
        if settings.compile:
            self.model.compile()
        if contender.model.startswith("onnx:"):
            from .onnx_runtime import in_onnxruntime  # its package is of the tests

            self.forward = in_onnxruntime(self.model, settings.img_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.scaler = torch.amp.GradScaler(settings.device, enabled=settings.dtype == "float16")
        shape = (settings.batch_size, 3, settings.img_size, settings.img_size)
        images = torch.randn(shape, device=settings.device)
        self.images = images.contiguous(memory_format=settings.memory_format)
        self.targets = torch.randint(contender.num_classes, (settings.batch_size,), device=settings.device)

    def training(self) -> None:
        """Forward, cross-entropy, backward, AdamW."""
        with self.settings.autocast():
            loss = F.cross_entropy(self.forward(self.images), self.targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def inference(self) -> None:
        with torch.inference_mode(), self.settings.autocast():
            self.forward(self.images)

    def latency(self) -> None:
        with torch.inference_mode(), self.settings.autocast():
            for _ in range(LATENCY_REPEATS):
                self.forward(self.images[:1])

    def run(self, part: str) -> None:
        """The method called `part`, with the model in the mode that it needs."""
        self.model.train(part == "training")
        getattr(self, part)()

    def task(self, part: str) -> Callable[[], None]:
        return partial(self.run, part)

    def call(self, function: Callable, *args: object) -> Any:
        """function(self, *args)."""
        return function(self, *args)
