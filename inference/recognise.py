"""The model that bare weights, such as the authors published, are of."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

import models
from models.convert import to_ours
from models.loading import unwrap
from utils import UserError, one_line

Shapes = Mapping[str, tuple[int, ...]]  # of weights, by our names

SPECTRAL_WEIGHT = re.compile(r"(?:stages\.([0-3])\.)?blocks\.\d+\.mixer\.(complex_weight|low_pass)")
STEMS = ("patch_embed.proj.weight", "stem.conv.0.weight")
WAVELET_FILTER = re.compile(r"(^|\.)[xi]fm\.")


def our_shapes(weights: Mapping[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of weights under our names, but for the constant wavelet filters that some files hold."""
    try:
        ours = to_ours(unwrap(weights))
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: its weights are of no model known here: {one_line(error)}") from error
    return {name: tuple(value.shape) for name, value in ours.items() if not WAVELET_FILTER.search(name)}


def recognise(shapes: Shapes) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the registered models that bare weights can be of, and the arguments that they show.

    One name if all shapes are those of a variant, the family's names for widths and depths of its own, none
    for weights that are not of our models.
    """
    family, kwargs = _structure(shapes)
    names = tuple(name for name in models.ARCHITECTURES if family and re.fullmatch(family, name))
    size = {"img_size": pixels} if (pixels := native_size(shapes)) else {}
    for name in names:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, num_classes=shapes.get("head.weight", (0,))[0], **kwargs, **size)
        except (ValueError, RuntimeError):  # the variant cannot be built like that
            continue
        if {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes:
            return (name,), kwargs
    return names, kwargs


def _structure(shapes: Shapes) -> tuple[str | None, dict[str, Any]]:
    """A pattern of the family's names, None if it is none of ours, and the arguments that the shapes show."""
    spectral = [match.groups() for match in map(SPECTRAL_WEIGHT.fullmatch, shapes) if match]
    stem = next((shapes[name] for name in STEMS if len(shapes.get(name, ())) == 4), None)
    if stem is None or not any(".mixer." in name for name in shapes) or "cls_token" in shapes:
        return None, {}
    kwargs: dict[str, Any] = {} if stem[1] == 3 else {"in_chans": stem[1]}
    scatters = any(leaf == "low_pass" for _, leaf in spectral)
    if scatters:
        blends = tuple(any(f"{part}_blend." in name for name in shapes) for part in ("channel", "token"))
        kwargs["mixing"] = {(True, False): "channel", (True, True): "channel_token"}.get(blends, "token")
    if "pos_embed" in shapes:
        kwargs["alpha"] = len(spectral)
        return r"svt_vanilla_(ti|xs|s|b)" if scatters else r"spectformer_(ti|xs|s|b)", kwargs
    kwargs["spectral_depths"] = tuple(sum(stage == str(i) for stage, _ in spectral) for i in range(4))
    if "aux_head.weight" in shapes:
        kwargs["token_label"] = True
    return r"svt_h_[sbl]" if scatters else r"spectformer_h_[sbl]", kwargs


def native_size(shapes: Shapes) -> tuple[int, int] | None:
    """The image size for which bare weights of ours were made; None if they do not depend on it.

    A spectral gate keeps half of its columns, so an odd width is not told from an even one: a square is
    assumed where that is possible.
    """
    grids = [(match[1], match[2], shapes[match[0]]) for match in map(SPECTRAL_WEIGHT.fullmatch, shapes) if match]
    positions, patches = shapes.get("pos_embed", ()), shapes.get(STEMS[0], ())
    if len(positions) == 3 and len(patches) == 4:
        rows = grids[0][2][0] if grids and grids[0][2] else math.isqrt(positions[1])
        return rows * patches[-1], positions[1] // max(rows, 1) * patches[-1]
    for stage, leaf, shape in grids:
        if stage is not None and len(shape) >= 2:
            rows, columns = shape[:2]
            if leaf == "complex_weight":
                columns = rows if rows // 2 + 1 == columns else 2 * (columns - 1)
            return rows * 4 * 2 ** int(stage), columns * 4 * 2 ** int(stage)
    return None
