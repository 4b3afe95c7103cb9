"""Checkpoints of untrained models."""

import timm
import torch

import models  # noqa: F401 (registers ours)
from runtime import checkpoints

PYRAMID = {
    "stem_width": 8,
    "embed_dims": (16, 16, 32, 32),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "mlp_ratios": (1, 1, 1, 1),
}
VANILLA = {"embed_dim": 32, "depth": 2, "alpha": 1, "num_heads": 2}
DIGITS = tuple("0123456789")


def save(path, arch="spectformer_ti", kwargs=VANILLA, classes=DIGITS, input_size=(32, 32), instead=None, **more):
    """A checkpoint as training leaves it, of an untrained model; returns the model.

    more: further keys; instead: keys that replace those of the model.
    """
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=len(classes), img_size=input_size, **kwargs).eval()
    state = {
        "model": model.state_dict(),
        "arch": arch,
        "model_kwargs": kwargs,
        "num_classes": len(classes),
        "class_names": list(classes),
        "input_size": list(input_size),
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    }
    checkpoints.save(path, state | more | (instead or {}))
    return model
