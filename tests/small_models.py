"""Every registered model at little width and depth, and images for it."""

import timm
import torch

import models  # noqa: F401 (registers them)

PYRAMID = {"stem_width": 8, "embed_dims": (16, 32, 32, 64), "depths": (1, 1, 2, 1), "mlp_ratios": (2, 2, 2, 2)}
VANILLA = {"embed_dim": 64, "depth": 5, "mlp_ratio": 2.0}
# Different in mechanism; the others differ in width and depth.
KINDS = ("spectformer_xs", "spectformer_h_s", "svt_h_s", "svt_vanilla_xs")


def is_vanilla(name):
    return timm.get_pretrained_cfg_value(name, "first_conv").startswith("patch_embed")


def is_small(name):
    """Whether it is for images of 32 pixels."""
    return name.endswith("_n")


def create(name, **arguments):
    torch.manual_seed(0)
    small = VANILLA if is_vanilla(name) else PYRAMID
    return timm.create_model(name, **{"img_size": 64, "num_classes": 10} | small | arguments)


def images(height=64, width=64, channels=3, batch=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
