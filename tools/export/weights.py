"""Weights alone, under our names or the authors'."""

import argparse
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from models.convert import to_original, to_ours
from models.loading import unwrap
from runtime import checkpoints
from runtime.tensor_files import save_tensors
from utils import UserError


def write_safetensors(args: argparse.Namespace) -> str:
    """The weights, and what prediction has to know; says how many."""
    return _write(args, (".safetensors",), *_read(args))


def write_original(args: argparse.Namespace) -> str:
    """The weights as the authors' code names them; says how many."""
    state, tensors = _read(args)
    arch = state.get("arch", "svt")
    if not arch.startswith(("spectformer", "svt")):
        raise UserError(f"{args.checkpoint}: it holds a {arch}, which the authors' code has not")
    return _write(args, (".pth", ".safetensors"), state, to_original(to_ours(tensors)))


def _read(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    state = checkpoints.load(args.checkpoint)
    return state, unwrap(checkpoints.weights(state, args.ema, args.checkpoint))


def _write(
    args: argparse.Namespace, suffixes: tuple[str, ...], state: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> str:
    if args.path.suffix not in suffixes:
        raise UserError(f"{args.path}: name it {' or '.join(suffixes)}")
    if args.path.suffix == ".safetensors":
        save_tensors(args.path, tensors, state)
    else:
        checkpoints.save(args.path, {"model": tensors})
    return f"{len(tensors)} tensors, {sum(tensor.numel() for tensor in tensors.values()):,} numbers"
