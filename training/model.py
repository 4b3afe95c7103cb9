"""Prepare a model for training: load its weights, freeze layers, count parameters."""

from timm.models import group_parameters
from torch import Tensor, nn

from models.loading import WeightMismatch, load_weights
from utils import UserError, one_line


def load(model: nn.Module, weights: dict[str, Tensor], path: str, new_head: bool) -> list[str]:
    """Call `load_weights`, and turn its errors into UserErrors that name the file."""
    try:
        return load_weights(model, weights, new_head=new_head)
    except (WeightMismatch, ValueError, RuntimeError, IndexError) as error:  # also for tensors with absurd shapes
        raise UserError(f"{path}: {one_line(error)}") from error


def layers_of(model: nn.Module) -> dict[int, list[str]]:
    """Parameter names by layer, from the stem (0) to the head, according to the model's `group_matcher`."""
    if not hasattr(model, "group_matcher"):
        raise UserError("--freeze-at: this model defines no layers (it has no group_matcher)")
    return group_parameters(model, model.group_matcher(coarse=False))


def freeze_layers(model: nn.Module, number: int) -> None:
    """Freeze the first `number` layers."""
    if number == 0:
        return
    layers = layers_of(model)
    if number >= len(layers):
        raise UserError(f"--freeze-at {number}: the model has {len(layers)} layers, and at least one must be trained")
    frozen = {name for layer in sorted(layers)[:number] for name in layers[layer]}
    for name, weight in model.named_parameters():
        weight.requires_grad_(name not in frozen)


def count_parameters(model: nn.Module, trained: bool = False) -> int:
    """The number of parameters, or of trainable parameters."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad or not trained)
