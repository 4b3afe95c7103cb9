"""The teacher: a classifier of the data set's own classes, and the images it expects."""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import timm
from timm.data import create_transform, resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from models import load_checkpoint
from utils import UserError, one_line


@dataclass(frozen=True)
class Teacher:
    """A classifier and the images it expects. `origin` identifies it."""

    model: nn.Module
    transform: Callable
    origin: dict[str, object]


def load_teacher(args: argparse.Namespace, class_names: Sequence[str]) -> Teacher:
    """The teacher of the command line, in evaluation mode.

    Raises:
        UserError: there is no such teacher, or it has not the data set's classes.
    """
    if args.pretrained:
        model, config, origin = _published(args, len(class_names))
    else:
        info = load_checkpoint(args.model_path, args.arch, input_size=args.input_size)
        model, named = info.model, info.checkpoint.get("class_names")
        if info.num_classes != len(class_names) or named not in (None, list(class_names)):
            raise UserError(
                f"--model-path {args.model_path}: its {info.num_classes} classes are not the "
                f"{len(class_names)} of --data-set {args.data_set}"
            )
        with open(args.model_path, "rb") as file:
            origin = {"arch": info.arch, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        config = {
            "input_size": info.input_size,
            "mean": info.mean,
            "std": info.std,
            "interpolation": info.interpolation,
        }
    transform = create_transform(**config, crop_pct=1.0, crop_mode="squash")
    origin |= {"input_size": list(config["input_size"]), "classes": len(class_names)}
    return Teacher(model.eval(), transform, origin)


def _published(args: argparse.Namespace, num_classes: int) -> tuple[nn.Module, dict, dict]:
    """(model, its transform's arguments, its identity) with the weights that timm publishes."""
    cfg = get_pretrained_cfg(args.arch) if timm.is_model(args.arch.split(".")[0]) else None
    if cfg is None or not cfg.has_weights:
        raise UserError(f"--arch {args.arch}: timm publishes no weights of such a model")
    if cfg.num_classes != num_classes:
        raise UserError(
            f"--arch {args.arch}: its published weights are for {cfg.num_classes} classes, "
            f"--data-set {args.data_set} has {num_classes}"
        )
    size = {"img_size": args.input_size} if args.input_size and cfg.fixed_input_size else {}
    try:
        model = timm.create_model(args.arch, pretrained=True, **size)
    except (OSError, RuntimeError, ValueError) as error:  # not fetched, or not for this size
        raise UserError(f"--arch {args.arch} --pretrained: {one_line(error)}") from error
    config = resolve_data_config(model=model)
    config = {key: config[key] for key in ("mean", "std", "interpolation")} | {
        "input_size": args.input_size or tuple(config["input_size"][1:])
    }
    return model, config, {"arch": args.arch, "weights": cfg.hf_hub_id or cfg.url}
