"""Deterministic weights and images behind the golden outputs in this folder.

Every tensor is drawn from a stream seeded by its own name, so a whole model's
weights are rebuilt from a list of names and shapes; only the outputs are stored.
The names are those of the authors' released checkpoints (see README.md here).
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights for one checkpoint entry: float32 of the given shape, seeded by the name."""
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    draw = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_mean":
        value = 0.1 * draw
    elif leaf == "running_var":
        value = 1.0 + 0.5 * np.abs(draw)
    elif leaf == "pos_embed" or leaf == "complex_weight":
        value = 0.5 * draw
    elif leaf == "complex_weight_ll":  # (C, H, W)
        value = draw
    elif leaf.startswith("complex_weight_lh_b"):
        value = 0.1 * draw
    elif leaf.startswith("complex_weight_lh"):  # (2, blocks, size, size)
        value = draw / np.sqrt(shape[-1])
    elif leaf == "bias":
        value = 0.1 * draw
    elif len(shape) == 1:  # a norm's weight
        value = 1.0 + 0.1 * draw
    else:
        value = draw / np.sqrt(np.prod(shape[1:]))
    return value.astype(np.float32)


def state_dict(spec_file: str | Path) -> dict[str, np.ndarray]:
    """All weights of one model, in the authors' checkpoint format, from its `*.keys.json`."""
    spec = json.loads(Path(spec_file).read_text())
    return {name: tensor(name, tuple(shape)) for name, shape in spec.items()}


def images(batch: int, height: int, width: int, seed: int = 20231114) -> np.ndarray:
    """A batch of already normalised images: float32, (batch, 3, height, width)."""
    return np.random.RandomState(seed).standard_normal((batch, 3, height, width)).astype(np.float32)


def output_weights(num_classes: int) -> np.ndarray:
    """Fixed (num_classes,) vector w; the golden gradients are those of (logits * w).sum()."""
    return np.random.RandomState(7).standard_normal(num_classes).astype(np.float32)
