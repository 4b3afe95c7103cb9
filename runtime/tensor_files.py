"""The `.safetensors` files of this project: weights with what prediction needs to know, and a digest."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
from torch import Tensor

from runtime.pickles import MAX_PICKLE_BYTES, Unusable
from runtime.schema import parse_json
from utils import atomic_write, one_line

CHUNK = 2**20
HEX_DIGITS = 64  # of a SHA-256

# What an exported file keeps beside the tensors, for `infer.py`.
METADATA_KEYS = (
    "arch",
    "model_kwargs",
    "num_classes",
    "input_size",
    "mean",
    "std",
    "crop_pct",
    "interpolation",
    "class_names",
)
TENSOR_DIGEST = "spectformer-sha256"


def save_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write `tensors` to a `.safetensors` file, with those METADATA_KEYS that `state` has, as JSON.

    Raises:
        MachineError: when the disk refuses; the old file is then unchanged.
    """
    # A copy of each: the format has no shared storage.
    separate = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(state[key]) for key in METADATA_KEYS if state.get(key) is not None}
    # The digest's name is there twice, so that a file whose digest has lost its name is still known as ours.
    metadata |= {"format": "pt", "digest": TENSOR_DIGEST, TENSOR_DIGEST: "0" * HEX_DIGITS}
    content = safetensors.torch.save(separate, metadata)
    start = _tensor_digest_place(content)
    digest = hashlib.sha256(content).hexdigest().encode()
    atomic_write(path, content[:start] + digest + content[start + HEX_DIGITS :])


def _tensor_digest_place(head: bytes) -> int | None:
    """Where in a safetensors file of ours the digest is, which counts as zeros in itself; None in others'."""
    header = head[8 : 8 + int.from_bytes(head[:8], "little")]
    if TENSOR_DIGEST.encode() not in header:
        return None
    found = re.search(rb'"%s":"([0-9a-f]{64})"' % TENSOR_DIGEST.encode(), header)
    if found is None:
        raise Unusable("it is damaged: its SHA-256 is missing")
    return 8 + found.start(1)


def _verify_tensors(file: BinaryIO, size: int) -> None:
    head = file.read(8)
    header = int.from_bytes(head, "little")
    if header > min(size, MAX_PICKLE_BYTES):
        raise Unusable(f"it is not a safetensors file, or it is damaged: a header of {header:,} bytes")
    head += file.read(header)
    start = _tensor_digest_place(head)
    if start is None:
        return
    digest = hashlib.sha256(head[:start] + b"0" * HEX_DIGITS + head[start + HEX_DIGITS :])
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    if digest.hexdigest().encode() != head[start : start + HEX_DIGITS]:
        raise Unusable("it is damaged: its content does not match its SHA-256")


def load_tensors(file: BinaryIO, path: Path, size: int) -> dict[str, Any]:
    """`{"model": tensors}` of a `.safetensors` file, with those METADATA_KEYS that ours have.

    Args:
        file: open for reading.
        path: its place; the library opens it again.
        size: of the file, in bytes.

    Raises:
        Unusable: it is damaged, or not such a file.
    """
    _verify_tensors(file, size)
    try:
        with safetensors.safe_open(path, "pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        ours = TENSOR_DIGEST in metadata
        return {"model": tensors} | {
            key: parse_json(metadata[key]) for key in METADATA_KEYS if ours and key in metadata
        }
    except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise Unusable(f"it is not a safetensors file, or it is damaged: {one_line(error)[:200]}") from error
