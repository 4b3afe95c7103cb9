"""What a classifier says at each place of its last feature map."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inputs.label_maps import MAP_SIZE, encode_label_map
from training.precision import Precision
from utils import UserError, one_line


def position_logits(model: nn.Module, images: Tensor) -> Tensor:
    """What a classifier says at each place of its last feature map.

    Each place's feature in turn takes the place of the whole feature map and goes through the model's head,
    which pools and normalises as it would; where the model has a classifier of tokens (`aux_head`), through
    that.

    Args:
        model: a classifier of timm's or ours.
        images: (B, 3, H, W).

    Returns:
        (B, classes, h, w).

    Raises:
        UserError: the model has no feature map, or a head that needs all of it.
    """
    name = type(model).__name__
    try:
        features = model.forward_features(images)
        places, grid = _places(model, features)
        if getattr(model, "token_label", False):
            logits = model.aux_head(places)
        else:
            logits = model.forward_head(_alone(model, places, features.ndim)).unflatten(0, places.shape[:2])
    except (AttributeError, RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"--arch: {name} cannot classify place by place: {one_line(error)[:200]}") from error
    if logits.ndim != 3 or logits.shape[2] != model.num_classes:
        raise UserError(f"--arch: the head of {name} gives {tuple(logits.shape)} place by place")
    return logits.mT.unflatten(2, grid)


def _places(model: nn.Module, features: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Features of the places, (B, h·w, C), and (h, w)."""
    if features.ndim == 4 and _channels_last(model):
        return features.flatten(1, 2), tuple(features.shape[1:3])
    if features.ndim == 4:
        return features.flatten(2).mT, tuple(features.shape[2:])
    places = features[:, model.num_prefix_tokens :] if hasattr(model, "num_prefix_tokens") else features
    grid = _token_grid(model, places.shape[1])
    return places, grid


def _channels_last(model: nn.Module) -> bool:
    return str(getattr(model, "output_fmt", "NCHW")).endswith("NHWC")


def _token_grid(model: nn.Module, tokens: int) -> tuple[int, int]:
    """The grid of a token sequence; timm's patch embedding says it, else it is square."""
    grid = tuple(getattr(getattr(model, "patch_embed", None), "grid_size", None) or ())
    side = math.isqrt(tokens)
    for candidate in (grid, getattr(model, "token_label_size", ()), (side, side)):
        if len(candidate) == 2 and math.prod(candidate) == tokens:
            return tuple(candidate)
    raise ValueError(f"{tokens} tokens are no grid")


def _alone(model: nn.Module, places: Tensor, ndim: int) -> Tensor:
    """Every place as the features of an image of its own, (B·h·w, …): one token, or one pixel.

    A class token would be pooled in the places' stead, so it is the place itself.
    """
    features = places.flatten(0, 1)
    if ndim == 4:
        return features[:, None, None] if _channels_last(model) else features[:, :, None, None]
    return features[:, None].expand(-1, 1 + getattr(model, "num_prefix_tokens", 0), -1)


@torch.inference_mode()
def label_maps(model: nn.Module, images: Tensor, precision: Precision) -> list[Tensor]:
    """The label maps, (2, 5, 18, 18) each, of images (B, 3, H, W)."""
    with precision.autocast():
        logits = position_logits(model, images)
    logits = F.interpolate(logits.float(), (MAP_SIZE, MAP_SIZE), mode="bilinear", antialias=True)
    if not logits.isfinite().all():
        raise UserError("the teacher's logits are not finite; try --amp none, or check --model-path")
    return [encode_label_map(of_image).cpu() for of_image in logits]
