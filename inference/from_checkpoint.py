"""A model from a checkpoint alone: ours says what it holds, the authors' is recognised by its weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo
from timm.models import PretrainedCfg, get_pretrained_cfg
from torch import nn

import models
from models.checkpoints import EMA_KEYS, check_model_kwargs, read_checkpoint, weights_of
from training.model import create_model, load
from utils import UserError, one_line

from .fields import read_fields
from .recognise import Shapes, native_size, our_shapes, recognise, stem_stride


@dataclass(frozen=True)
class ModelInfo:
    """What a checkpoint says about its model and about the images it is for."""

    path: Path
    arch: str
    model_kwargs: dict[str, Any]
    num_classes: int
    class_names: tuple[str, ...] | None
    input_size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    interpolation: str
    ema: bool
    data_set: str | None  # of the run that trained it
    classes: tuple[str, ...] | None  # of that data set, where they were chosen
    val_split: tuple[float, int] | None  # of its folders, where training held images back

    def class_name(self, index: int) -> str:
        """A class as it is told to a reader; ImageNet's WordNet ids come with their first description."""
        name = self.labels[index] if self.labels else str(index)
        try:
            return f"{name} {imagenet().label_name_to_description(name).split(',')[0]}"
        except KeyError:  # not of ImageNet
            return name

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """What a data set calls the classes: by the checkpoint, or by ImageNet for so many; () if that is unknown."""
        if self.class_names is None and self.num_classes == imagenet().num_classes():
            return tuple(imagenet().label_names())
        return self.class_names or ()


@cache
def imagenet() -> ImageNetInfo:
    return ImageNetInfo()


def build_from_checkpoint(
    path: str | Path,
    arch: str | None = None,
    *,
    state: Mapping[str, Any] | None = None,
    ema: bool | None = None,
    input_size: tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, ModelInfo]:
    """The model that a checkpoint holds, in evaluation mode on the CPU, and what there is to know about it.

    Args:
        path: a checkpoint of ours, of the authors' or of timm.
        arch: the model's name, needed only where the checkpoint neither says nor shows it.
        state: the file's content, where it has been read already.
        ema: the averaged weights, the trained ones, or (None) the averaged ones if there are any.
        input_size: (height, width) to build it for, by default its own; weights are resized.
        model_kwargs: constructor arguments beside those of the checkpoint.

    Raises:
        UserError: the file is unusable, contradicts `arch`, or is of no known model.
    """
    path = Path(path)
    state = read_checkpoint(path) if state is None else state
    weights = weights_of(state, ema, path)
    shapes = our_shapes(weights, path)
    name, told_kwargs = _identify(state, shapes, arch, model_kwargs or {}, path)
    cfg = _pretrained_cfg(name, path)
    check_model_kwargs(told_kwargs, f"{path}: model_kwargs")
    check_model_kwargs(model_kwargs or {}, "--model-kwargs")
    kwargs = told_kwargs | dict(model_kwargs or {})
    told = read_fields(state, cfg, path)
    told_size = told["input_size"] or native_size(shapes, stem_stride(name, kwargs))
    size = input_size or told_size or tuple(cfg.input_size[1:])
    num_classes = state.get("num_classes") or _count_classes(shapes, cfg, path)
    try:
        model = create_model(name, num_classes, size, kwargs)
    except UserError as error:  # of the size that was asked for
        raise UserError(f"{path}: {error}") from error
    load(model, weights, str(path), new_head=False)
    if told["class_names"] is not None and len(told["class_names"]) != num_classes:
        raise UserError(f"{path}: it names {len(told['class_names'])} classes and has {num_classes}")
    ema = ema is not False and any(state.get(key) for key in EMA_KEYS)
    info = ModelInfo(path, name, kwargs, num_classes, ema=ema, **told | {"input_size": size})
    return model.eval(), info


def _identify(
    state: Mapping[str, Any], shapes: Shapes, arch: str | None, model_kwargs: Mapping[str, Any], path: Path
) -> tuple[str, dict[str, Any]]:
    """(name, constructor arguments): as the checkpoint says, else as its weights show, else `arch`."""
    if state.get("arch") is None:
        fitting, kwargs, untold = recognise(shapes)
        if untold and "mixers" not in model_kwargs:
            raise UserError(f"{path}: its weights, of {' or '.join(fitting)}, do not show {untold}")
    else:
        fitting, kwargs = (_full_name(state["arch"]),), dict(state.get("model_kwargs") or {})
    if arch is None:
        if len(fitting) != 1:
            hint = f" ({', '.join(fitting)} with --model-kwargs)" if fitting else ""
            raise UserError(f"{path}: it does not say which model it holds; name it with --arch{hint}")
        return fitting[0], kwargs
    name = _full_name(arch)
    if name not in fitting and (fitting or name in models.ARCHITECTURES):
        raise UserError(f"{path}: it holds {' or '.join(fitting) or 'other weights'}, not --arch {arch}")
    return name, kwargs


def _full_name(name: str) -> str:
    """``svt_s`` is short for ``svt_h_s``."""
    return re.sub(r"^svt_(?=[sbl]$)", "svt_h_", models.resolve_arch(name))


def _pretrained_cfg(name: str, path: Path) -> PretrainedCfg:
    try:
        return get_pretrained_cfg(name) or PretrainedCfg()
    except RuntimeError as error:  # a tag that the model has not
        raise UserError(f"{path}: {one_line(error)}") from error


def _count_classes(shapes: Shapes, cfg: PretrainedCfg, path: Path) -> int:
    names = (cfg.classifier,) if isinstance(cfg.classifier, str) else tuple(cfg.classifier or ("head",))
    if not shapes.get(f"{names[0]}.weight"):
        raise UserError(f"{path}: it has no classifier {names[0]}.weight, so it cannot predict")
    return shapes[f"{names[0]}.weight"][0]
