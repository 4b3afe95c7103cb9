"""Weights alone, under our names or the authors'."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from models.checkpoints import read_checkpoint, weights_of
from models.convert import to_original, to_ours
from models.loading import unwrap
from runtime import checkpoints
from runtime.checkpoints import save_safetensors
from utils import UserError


def write_safetensors(args: argparse.Namespace) -> str:
    """The weights, and what prediction has to know; says how many."""
    state, tensors = _read(args)
    return _write(args, (".safetensors",), state, halved(tensors, args.checkpoint) if args.half else tensors)


def halved(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors with float16 in the place of other floats.

    Raises:
        UserError: one is too large for it.
    """
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    for name, tensor in half.items():
        if tensor.is_floating_point() and tensor.isinf().any():
            raise UserError(f"--half: {name} of {path} has numbers beyond float16's")
    return half


def write_original(args: argparse.Namespace) -> str:
    """The weights as the authors' code names them; says how many."""
    state, tensors = _read(args)
    arch = state.get("arch", "svt")
    if not arch.startswith(("spectformer", "svt")):
        raise UserError(f"{args.checkpoint}: it holds a {arch}, which the authors' code has not")
    return _write(args, (".pth", ".safetensors"), state, to_original(to_ours(tensors)))


def _read(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = read_checkpoint(args.checkpoint)
    return state, unwrap(weights_of(state, args.ema, args.checkpoint))


def _write(
    args: argparse.Namespace, suffixes: tuple[str, ...], state: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    if args.path.suffix not in suffixes:
        raise UserError(f"{args.path}: name it {' or '.join(suffixes)}")
    if args.path.suffix == ".safetensors":
        save_safetensors(args.path, tensors, state)
    else:
        checkpoints.save(args.path, {"model": tensors})
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} numbers"
