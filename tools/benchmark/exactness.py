"""How far half precision strays: logits against float64, the losses of the first steps against float32's."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice

import timm
import torch
import torch.nn.functional as F
from timm.data import create_transform
from torch import Tensor, nn

from inputs.catalogue import build_dataset
from utils import UserError

from .contenders import Contender
from .settings import Settings

SEEDS = (0, 1, 2)
RATE = 5e-4  # AdamW's, as in the published recipes, which it is at the last step: they warm up too


def compare_exactness(labels: Sequence[str], folder: str, settings: Settings, steps: int) -> dict:
    """For each contender, on `folder`/val: errors of its logits, and its losses over `steps` steps of training.

    "logit_error" is the L2 norm of the difference to float64 over that of float64's logits, for each seed of the
    weights, or once for weights that come with the package. "loss_gap" is, for each seed, the mean over the steps of
    the absolute difference between the losses in half precision and in float32, from the same weights, on the same
    batches.
    """
    contenders = [Contender.parse(label, settings) for label in labels]
    if any(contender.settings.dtype == "float32" for contender in contenders):
        raise UserError("--exactness needs --dtype bfloat16 or float16, what to compare with float32")
    rows = {}
    for contender in contenders:
        batches = list(islice(_batches(folder, contender.settings), steps))
        halves, floats = (
            [_losses(contender, dtype, seed, batches) for seed in SEEDS]
            for dtype in (contender.settings.dtype, "float32")
        )
        rows[contender.label] = {
            "settings": asdict(contender.settings),
            "trained": _has_weights(contender),
            "logit_error": [_logit_error(contender, seed, batches[0][0]) for seed in _seeds(contender)],
            "losses": halves,
            "losses_float32": floats,
            "loss_gap": [_mean_gap(*pair) for pair in zip(halves, floats, strict=True)],
        }
    return {"settings": asdict(settings), "exactness": rows}


def exactness_table(result: dict) -> str:
    lines = [f"{'model':32}{'logits against float64':>24}{'losses against float32':>24}"]
    for label, row in result["exactness"].items():
        errors, gaps = (" ".join(f"{error:.4f}" for error in row[key]) for key in ("logit_error", "loss_gap"))
        lines.append(f"{label:32}{errors:>24}{gaps:>24}")
    return "\n".join(lines)


def _mean_gap(one: Sequence[float], other: Sequence[float]) -> float:
    return statistics.mean(abs(a - b) for a, b in zip(one, other, strict=True))


def _batches(folder: str, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the folder's images in an order drawn once, again and again."""
    dataset = build_dataset("FOLDER", folder, "val")
    transform = create_transform(settings.img_size, interpolation="bicubic", crop_pct=0.875)
    if len(dataset) < settings.batch_size:
        raise UserError(f"--exactness {folder}: fewer than --batch-size {settings.batch_size} images")
    generator = torch.Generator().manual_seed(0)
    while True:
        for indices in torch.randperm(len(dataset), generator=generator).split(settings.batch_size):
            if len(indices) == settings.batch_size:
                loaded = [dataset.load(index) for index in indices.tolist()]
                images = torch.stack([transform(image) for image, _ in loaded])
                labels = torch.tensor([label for _, label in loaded])
                yield images.to(settings.device), labels.to(settings.device)


def _has_weights(contender: Contender) -> bool:
    """Whether weights come with the package."""
    return bool(timm.get_pretrained_cfg_value(contender.model, "file"))


def _seeds(contender: Contender) -> Sequence[int]:
    return SEEDS[:1] if _has_weights(contender) else SEEDS


def _build(contender: Contender, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return contender.build()


def _logit_error(contender: Contender, seed: int, images: Tensor) -> float:
    model = _build(contender, seed)
    if _has_weights(contender):
        model.load_state_dict(timm.create_model(contender.model, pretrained=True).state_dict())
    model.eval()
    with torch.no_grad():
        with contender.settings.autocast():
            found = model(images).double()
        exact = model.double()(images.double())
    return ((found - exact).norm() / exact.norm()).item()


def _losses(contender: Contender, dtype: str, seed: int, batches: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """The losses of training from the seed's weights, a step a batch."""
    model = _build(contender, seed).train()
    settings = replace(contender.settings, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    scaler = torch.amp.GradScaler(settings.device, enabled=dtype == "float16")
    losses = []
    for step, (images, labels) in enumerate(batches, 1):
        optimizer.param_groups[0]["lr"] = RATE * step / len(batches)
        with settings.autocast():
            logits = model(images)
            loss = F.cross_entropy(logits.float(), labels % logits.shape[1])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
