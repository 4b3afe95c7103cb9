"""The model that bare weights, such as the authors published, are of."""

import math
import re
from collections.abc import Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor

import models
from models.convert import to_ours
from models.loading import unwrap
from models.mixers import MIXERS, build_mixer
from utils import UserError, one_line

Shapes = Mapping[str, tuple[int, ...]]  # of weights, by our names

BLOCK = re.compile(r"(?:stages\.([0-3])\.)?blocks\.([0-9]{1,4})\.")
MIXER_WEIGHT = re.compile(BLOCK.pattern + r"mixer\.([^.]+)")
FILTER = re.compile(BLOCK.pattern + r"mixer\.(complex_weight|low_pass)")
PATCHES, STEM = "patch_embed.proj.weight", "stem.conv.0.weight"
PATCH_SIZE, STEM_STRIDE = 16, 4  # of the models that do not say otherwise
WAVELET_FILTER = re.compile(r"(^|\.)[xi]fm\.")


class Recognised(NamedTuple):
    """What bare weights show.

    names: the registered models that they can be of: one if all shapes are those of a variant, the family's names for
    widths and depths of its own, none for weights that are not of our models. kwargs: the arguments that they show.
    untold: what has to be given because they do not show it.
    """

    names: tuple[str, ...]
    kwargs: dict[str, Any]
    untold: str = ""


def our_shapes(weights: Mapping[str, Tensor], path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of weights under our names, but for the constant wavelet filters that some files hold."""
    try:
        ours = to_ours(unwrap(weights))
    except (ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"{path}: its weights are of no model known here: {one_line(error)}") from error
    return {name: tuple(value.shape) for name, value in ours.items() if not WAVELET_FILTER.search(name)}


def recognise(shapes: Shapes) -> Recognised:
    """The model that bare weights are of.

    What leaves no trace in them is taken as in the registered models: a stem's stride, options of mixers, dropout.
    """
    stem = next((shapes[name] for name in (PATCHES, STEM) if len(shapes.get(name, ())) == 4), None)
    mixers = _mixers_by_stage(shapes)
    if stem is None or "cls_token" in shapes or mixers is None or not any(any(stage) for stage in mixers):
        return Recognised((), {})
    kwargs: dict[str, Any] = {} if stem[1] == 3 else {"in_chans": stem[1]}
    vanilla = "pos_embed" in shapes
    if vanilla and stem[-1] != PATCH_SIZE:
        kwargs["patch_size"] = stem[-1]
    if "aux_head.weight" in shapes:
        kwargs["token_label"] = True
    scatters = any(name and name.startswith("scattering_") for stage in mixers for name in stage)
    family = ("svt_vanilla_", "svt_h_") if scatters else ("spectformer_(?!h_)", "spectformer_h_")
    names = [name for name in models.ARCHITECTURES if re.match(family[not vanilla], name)]
    # One without weights stands for those that have none.
    arranged = _arrangement([[name or "none" for name in stage] for stage in mixers], vanilla)
    fitting = next(((name,) for name in names if _is_of(name, kwargs | arranged, shapes)), tuple(names))
    unseen = [
        f"block {i + 1}" + ("" if vanilla else f" of stage {stage + 1}")
        for stage, blocks in enumerate(mixers)
        for i, name in enumerate(blocks)
        if name is None
    ]
    if not unseen:
        return Recognised(fitting, kwargs | arranged)
    example = f"--model-kwargs mixers={arranged['mixers']}, or with another than none"
    return Recognised(fitting, kwargs, f"the mixer of {unseen[0]}, which has no weights: give {example}")


def _mixers_by_stage(shapes: Shapes) -> list[list[str | None]] | None:
    """The mixers of the blocks, None for one without weights; or None, if weights are of no known mixer.

    The blocks of vanilla models are one stage.
    """
    leaves: dict[tuple[int, int], set[str]] = {}
    for name in shapes:
        if match := BLOCK.match(name):
            found = leaves.setdefault((int(match[1] or 0), int(match[2])), set())
            if weight := MIXER_WEIGHT.match(name):
                found.add(weight[3])
    if any(found and frozenset(found) not in _mixers_by_weights() for found in leaves.values()):
        return None
    stages = groupby(sorted(leaves), key=lambda block: block[0])
    return [[_mixers_by_weights().get(frozenset(leaves[block])) for block in blocks] for _, blocks in stages]


@cache
def _mixers_by_weights() -> dict[frozenset[str], str]:
    """The names of the mixers by what their weights are called, those that have any."""
    with torch.device("meta"):
        weights = {name: build_mixer(name, 64, (4, 4), 1).state_dict() for name in MIXERS}
    return {frozenset(key.split(".")[0] for key in found): name for name, found in weights.items() if found}


def _arrangement(mixers: list[list[str]], vanilla: bool) -> dict[str, Any]:
    """The arguments that put these mixers into the blocks, those that the authors' models have where they do."""
    depths = tuple(sum(name != "attention" for name in stage) for stage in mixers)
    kind = next((name for stage in mixers for name in stage if name != "attention"), "spectral")
    usual = [[kind] * depth + ["attention"] * (len(stage) - depth) for stage, depth in zip(mixers, depths, strict=True)]
    if mixers == usual and (kind == "spectral" or kind.startswith("scattering_")):
        mixing = {} if kind == "spectral" else {"mixing": kind.removeprefix("scattering_")}
        return mixing | ({"alpha": depths[0]} if vanilla else {"spectral_depths": depths})
    stages = [",".join(f"{name}*{len(list(same))}" for name, same in groupby(stage)) for stage in mixers]
    return {"mixers": "/".join(stages)}


def _is_of(name: str, kwargs: Mapping[str, Any], shapes: Shapes) -> bool:
    """Whether the registered model, with these arguments, has weights of these shapes."""
    size = native_size(shapes, stem_stride(name, kwargs))
    try:
        with torch.device("meta"):
            classes = shapes.get("head.weight", (0,))[0]
            model = timm.create_model(name, num_classes=classes, **kwargs, **({"img_size": size} if size else {}))
    except (ValueError, RuntimeError):  # the variant cannot be built like that
        return False
    return {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


def stem_stride(name: str, kwargs: Mapping[str, Any]) -> int:
    """The stride of a pyramid's first stage, as told or as is usual for the registered model."""
    return kwargs["stem_stride"] if kwargs.get("stem_stride") in (1, 2, 4) else _usual_stride(name)


@cache
def _usual_stride(name: str) -> int:
    if name not in models.ARCHITECTURES:
        return STEM_STRIDE
    with torch.device("meta"):
        return getattr(timm.create_model(name), "stem_stride", STEM_STRIDE)


def native_size(shapes: Shapes, stride: int = STEM_STRIDE) -> tuple[int, int] | None:
    """The image size for which bare weights of ours were made; None if they do not depend on it.

    A spectral gate keeps half of its columns, so an odd width is not told from an even one: a square is
    assumed where that is possible. `stride` is that of a pyramid's first stage.
    """
    grids = [(match[1], match[3], shapes[match[0]]) for match in map(FILTER.fullmatch, shapes) if match]
    positions, patches = shapes.get("pos_embed", ()), shapes.get(PATCHES, ())
    if len(positions) == 3 and len(patches) == 4:
        rows = grids[0][2][0] if grids and grids[0][2] else math.isqrt(positions[1])
        return rows * patches[-1], positions[1] // max(rows, 1) * patches[-1]
    for stage, leaf, shape in grids:
        if stage is not None and len(shape) >= 2:
            rows, columns = shape[:2]
            if leaf == "complex_weight":
                columns = rows if rows // 2 + 1 == columns else 2 * (columns - 1)
            return rows * stride * 2 ** int(stage), columns * stride * 2 ** int(stage)
    return None
