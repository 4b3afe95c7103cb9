"""Write checkpoints, and find the one to resume from. `models.checkpoints` reads them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from models.checkpoints import METADATA_KEYS, CheckpointError, peek, read_checkpoint
from utils import UserError, atomic_write, tell

CHECKPOINTS = "checkpoint*.pth"


def save(path: str | os.PathLike, state: Mapping[str, Any]) -> None:
    """Write `state` (tensors, plain values, and dicts, lists and tuples of them) to `path`, atomically.

    `torch.save` writes a zip archive with a CRC-32 of each entry, with which `read_checkpoint` detects damage.

    Raises:
        MachineError: the disk is full or fails; the old file is then unchanged.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # raised by torch's zip writer after a write has failed
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    atomic_write(path, write)


def save_safetensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` to a `.safetensors` file, with the METADATA_KEYS in `state` as JSON.

    Raises:
        MachineError: the disk is full or fails; the old file is then unchanged.
    """
    # Copy: the format does not support shared storage.
    separate = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(state[key]) for key in METADATA_KEYS if state.get(key) is not None}
    atomic_write(path, safetensors.torch.save(separate, metadata | {"format": "pt"}))


def newest_first(directory: str | os.PathLike) -> list[tuple[tuple[int, int], Path]]:
    """(epoch, step) and path of a directory's readable checkpoints, the newest first; others are named on stderr."""
    found = []
    for path in Path(directory).glob(CHECKPOINTS):
        try:
            state = peek(path)
            if not {"epoch", "step"} <= state.keys():
                raise CheckpointError(f"{path}: it contains no epoch and step")
            found.append(((state["epoch"], state["step"]), path))
        except CheckpointError as error:
            tell(f"passing over {error}")
    return sorted(found, reverse=True)


def newest_intact(directory: str | os.PathLike) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The path and content of a directory's newest intact checkpoint by (epoch, step); Nones without checkpoints.

    Raises:
        UserError: there are checkpoints, but none is intact; a new run would overwrite them.
    """
    for _, path in newest_first(directory):
        try:
            return path, read_checkpoint(path)
        except CheckpointError as error:
            tell(f"passing over {error}")
    if number := len(list(Path(directory).glob(CHECKPOINTS))):
        raise UserError(f"{directory}: none of its {number} checkpoints is intact; move them away to start again")
    return None, None
