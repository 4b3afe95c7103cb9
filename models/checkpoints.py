"""Read checkpoints of this project, the original authors and timm, and safetensors, without executing their code."""

import argparse
import json
import os
import pathlib
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
import safetensors
import torch
from torch import Tensor

StateDict = dict[str, Tensor]

EMA_KEYS = ("model_ema", "state_dict_ema")
PREPROCESSING = ("mean", "std", "crop_pct", "interpolation")
# The JSON metadata of an exported .safetensors file.
METADATA_KEYS = ("arch", "model_kwargs", "num_classes", "class_names", "input_size", *PREPROCESSING)
_CONTAINERS = ("model", "state_dict", "model_state_dict", "net")
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DistributedDataParallel and torch.compile
_COMMON_PREFIXES = ("model.", "net.", "backbone.", "encoder.")
# timm arguments that make it read other files or the network.
READING_ARGUMENTS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
# Types in DeiT-style training states and older files of this project, besides tensors and plain values.
_scalar = np.float64().__reduce__()[0]
_SAFE = [
    argparse.Namespace,
    torch.torch_version.TorchVersion,
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),  # Python 3.13 and later
    np.dtype,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),  # NumPy 2 and later
    *(type(np.dtype(code)) for code in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u1", "?")),
]


class CheckpointError(ValueError):
    """A file cannot be used as a checkpoint; the message is one line that begins with its path."""


def read_checkpoint(path: str | os.PathLike, verify: bool = True) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after verifying the CRC-32 of every entry of its zip archive.

    Files in the format of torch < 1.6 and `.safetensors` files have no checksums. Without `verify`, checksums are
    skipped and the tensors are memory-mapped, which takes about 10 ms.

    Returns:
        The file's dict. A saved `argparse.Namespace` under "args" is converted to a dict. For a `.safetensors` file,
        {"model": tensors} and those METADATA_KEYS that the file has.

    Raises:
        CheckpointError: if the file does not exist, is damaged or is not a checkpoint.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: {'not a regular file' if os.path.exists(path) else 'no such file'}")
    try:
        if os.fspath(path).endswith(".safetensors"):
            return _read_safetensors(path)
        if verify:
            check_archive(path)
        with torch.serialization.safe_globals(_SAFE), warnings.catch_warnings(action="ignore"):
            mmap = not verify and zipfile.is_zipfile(path)
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # torch, zipfile and safetensors raise many types of errors for a damaged file
        # Keep only the first sentence of torch's reason; the rest advises to load the file unsafely.
        text, pickled, _ = str(error).strip().partition("\n\nCheck the documentation")
        reason = text.rpartition("\n")[2].rpartition("error: ")[2] if pickled else text.partition("\n")[0]
        reason = reason.partition(". ")[0]
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({reason or type(error).__name__})") from error
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{path}: it contains a {type(checkpoint).__name__}, not a checkpoint dict")
    if isinstance(checkpoint.get("args"), argparse.Namespace):
        checkpoint["args"] = vars(checkpoint["args"])
    return checkpoint


def peek(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint without verifying it."""
    return read_checkpoint(path, verify=False)


def check_archive(file: str | os.PathLike | BinaryIO) -> None:
    """Verify all CRC-32s of a zip archive; raise zipfile.BadZipFile or another error if it is damaged."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")


def _read_safetensors(path: str | os.PathLike) -> dict[str, Any]:
    with safetensors.safe_open(path, "pt", device="cpu") as file:
        metadata = file.metadata() or {}
        checkpoint: dict[str, Any] = {"model": {name: file.get_tensor(name) for name in file.keys()}}  # noqa: SIM118
    for key in METADATA_KEYS:
        if key in metadata:
            with suppress(ValueError):  # another program's entry of that name, not JSON
                checkpoint[key] = json.loads(metadata[key])
    return checkpoint


def weights_of(
    checkpoint: Mapping[str, Any], ema: bool | None = None, path: str | os.PathLike = "checkpoint"
) -> StateDict:
    """Return the state dict in a checkpoint of any known layout, without the name prefixes of wrappers.

    `ema` is True for the averaged (EMA) weights, False for the trained ones, None for the averaged ones if present.

    Raises:
        CheckpointError: if the checkpoint has no such weights.
    """
    averaged = next((checkpoint[key] for key in EMA_KEYS if checkpoint.get(key)), None)
    if ema and averaged is None:
        raise CheckpointError(f"{path}: it has no averaged (EMA) weights; use --no-ema")
    found = unwrap(averaged if averaged is not None and ema is not False else checkpoint)
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        names = ", ".join(str(name)[:40] for name in list(checkpoint)[:12])
        raise CheckpointError(f"{path}: it has no model weights; its keys are: {names}")
    return found


def unwrap(checkpoint: Mapping[str, Any]) -> StateDict:
    """Return the innermost state dict of {"model": ...}, {"state_dict": ...} etc., without wrappers' prefixes."""
    while (key := next((key for key in _CONTAINERS if isinstance(checkpoint.get(key), Mapping)), None)) is not None:
        checkpoint = checkpoint[key]
    weights = {_WRAPPERS.sub("", str(name)): value for name, value in checkpoint.items()}
    for prefix in _COMMON_PREFIXES:
        found = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        # Beside "model.", Lightning's files contain the tensors of losses and metrics.
        if found and (prefix == "model." or len(found) == len(weights)):
            return found
    return weights


def check_model_kwargs(model_kwargs: Mapping[str, Any], source: str) -> None:
    """Raise CheckpointError, with a message that begins with `source`, if arguments make timm open a URL or a file."""
    found = READING_ARGUMENTS.intersection(model_kwargs)
    if found:
        raise CheckpointError(f"{source}: {sorted(found)[0]} would make timm read other files; leave it out")
