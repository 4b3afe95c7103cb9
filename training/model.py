"""A model as the command line asks for it: built by name, given weights, its layers frozen or recomputed."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

import models
from models.checkpoints import read_checkpoint, weights_of
from models.loading import WeightMismatch, classifier_names, load_weights, unwrap
from utils import UserError, one_line


def create_model(
    arch: str, num_classes: int, input_size: tuple[int, int], model_kwargs: dict[str, Any], flag: str = "--arch"
) -> nn.Module:
    """Any registered model, ours or timm's, for images of `input_size` (height, width) in pixels.

    Raises:
        UserError: no such model, or it does not take these arguments.
    """
    try:
        return models.create_model(arch, num_classes, input_size, model_kwargs)
    except models.ModelError as error:
        raise UserError(f"{flag} {error}") from error


def labels_tokens(arch: str) -> bool:
    """Whether a model of that name can have a head that classifies every token."""
    name = models.resolve_arch(arch)
    if name not in models.ARCHITECTURES:
        return False
    with torch.device("meta"):
        return hasattr(timm.create_model(name), "token_label")


def load(model: nn.Module, weights: dict[str, Tensor], path: str, new_head: bool) -> list[str]:
    """`load_weights`, whose complaints become the user's and name the file."""
    try:
        return load_weights(model, weights, new_head=new_head)
    except (WeightMismatch, ValueError, RuntimeError, IndexError) as error:  # of tensors with absurd shapes, too
        raise UserError(f"{path}: {one_line(error)}") from error


def load_finetuned(model: nn.Module, path: str, class_names: tuple[str, ...], keep_classifier: bool) -> list[str]:
    """Load the weights to begin with; what of the model they left untouched.

    With `keep_classifier` the file's classifier is taken if it is for these very classes.
    """
    state = read_checkpoint(path)
    weights = unwrap(weights_of(state, path=path))
    classifier = weights.get(f"{classifier_names(model)[0]}.weight")
    same_number = classifier is not None and classifier.shape[:1] == (len(class_names),)
    same_names = tuple(state.get("class_names") or class_names) == tuple(class_names)
    return load(model, weights, path, new_head=not (keep_classifier and same_number and same_names))


def layers_of(model: nn.Module) -> dict[int, list[str]]:
    """Parameter names by layer, from the stem (0) to the head, as the model's `group_matcher` says."""
    if not hasattr(model, "group_matcher"):
        raise UserError("--freeze-at and --layer-decay: this model does not say what its layers are")
    return group_parameters(model, model.group_matcher(coarse=False))


def freeze_layers(model: nn.Module, number: int) -> None:
    """Take the first `number` layers out of training."""
    if number == 0:
        return
    layers = layers_of(model)
    if number >= len(layers):
        raise UserError(f"--freeze-at {number}: the model has {len(layers)} layers, one has to be trained")
    frozen = {name for layer in sorted(layers)[:number] for name in layers[layer]}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)


def enable_grad_checkpointing(model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:
        raise UserError(f"--grad-checkpointing: this model has none ({one_line(error)})") from error


def count_parameters(model: nn.Module, trained: bool = False) -> int:
    """The number of weights, or of those that are trained."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trained)
