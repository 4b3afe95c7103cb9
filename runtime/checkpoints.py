"""Checkpoints on disk: written whole, checked when read, never executed.

A checkpoint is what `torch.save` writes, a zip archive, with a comment at its end that tells where the run
stood and a SHA-256 of every byte before it. Plain `torch.load(path, weights_only=True)` reads it too.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from models.loading import unwrap
from runtime.contents import COUNT, checked
from runtime.files import open_file
from runtime.pickles import Unusable
from runtime.schema import Fields, Number, parse_json
from runtime.tensor_files import CHUNK, HEX_DIGITS, load_tensors
from runtime.untrusted import END_RECORD, load_torch
from utils import UserError, atomic_write, one_line, quote

MAX_FILE_BYTES = 64 * 2**30
EMA_KEYS = ("model_ema", "state_dict_ema")

# The last two bytes of a zip archive's end record count the bytes of the comment after it.
COMMENT = re.compile(
    rb"PK\x05\x06.{16}(?P<length>..)(?P<comment>spectformer (?P<label>\{[^{}]*\}) "
    rb"sha256:(?P<digest>[0-9a-f]{64}))\Z",
    re.DOTALL,
)
MAX_LABEL = 2**10
LABEL = Fields({"epoch": COUNT, "step": COUNT, "branch": Number(0, 2**63, whole=True)}, others=Number(finite=False))


def save(path: str | os.PathLike, state: Mapping[str, Any], label: Mapping[str, float] | None = None) -> None:
    """Write `state` to `path`, atomically, with its digest.

    Args:
        path: the file to replace.
        state: tensors, numbers, strings, None, and dicts, lists, tuples of them. numpy scalars, paths and
            namespaces are stored as their plain equivalents.
        label: numbers that `read_label` is to find without reading the file, beside `epoch`,
            `step` and the number of the last branch of its `lineage`.

    Raises:
        MachineError: when the disk refuses; the old file is then unchanged.
        TypeError: for a value that could not be loaded again.
    """
    plain = _plain(state, "state")
    told = {key: plain[key] for key in ("epoch", "step") if key in plain}
    if "lineage" in plain:
        told["branch"] = plain["lineage"][-1][0]
    told |= label or {}

    def write(file: BinaryIO) -> None:
        archive = _Archive(file)
        torch.save(plain, archive)
        archive.finish(told)

    atomic_write(path, write)


class _Archive(io.RawIOBase):
    """A file for `torch.save` that hashes what passes and holds back the zip's end record for `finish`.

    A failing write is kept and raised by `finish`: torch's writer would replace it by an error of its own.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = hashlib.sha256()
        self._end = b""
        self._error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        if self._error is None and size:
            try:
                if size >= END_RECORD:
                    self._put(self._end)
                    self._put(memoryview(data).cast("B")[:-END_RECORD])
                    self._end = bytes(memoryview(data).cast("B")[-END_RECORD:])
                else:
                    held = self._end + bytes(data)
                    self._put(held[:-END_RECORD])
                    self._end = held[-END_RECORD:]
            except OSError as error:
                self._error = error
        return size

    def _put(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)

    def finish(self, label: Mapping[str, float]) -> None:
        if self._error is not None:
            raise self._error
        head = b"spectformer %s sha256:" % json.dumps(label).encode()
        if len(head) > MAX_LABEL:
            raise ValueError(f"the label of a checkpoint is longer than {MAX_LABEL} bytes: {label}")
        self._put(self._end[:-2] + struct.pack("<H", len(head) + HEX_DIGITS) + head)
        self._file.write(self._digest.hexdigest().encode())


def _plain(value: Any, where: str) -> Any:
    """`value` made of types that every later version can load."""
    if value is None or type(value) in (bool, int, float, str, bytes, torch.Size, torch.device, torch.dtype):
        return value
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, f"{where}[{quote(key)}]") for key, item in value.items()}
    if isinstance(value, argparse.Namespace):
        return _plain(vars(value), where)
    if isinstance(value, (list, tuple)):
        items = [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (str, os.PathLike)):
        return str(value)
    raise TypeError(f"{where} is a {type(value).__name__}, which a checkpoint cannot hold")


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint: ours, the authors', timm's, or a `.safetensors` file. Runs nothing that it holds.

    A digest, where there is one, is verified, and so are the checksums of a zip archive without one. What is in
    it is of the kinds that `runtime.contents.FIELDS` declares; a field that is None is left out. A
    `.safetensors` file comes back as `{"model": tensors, **METADATA_KEYS that it has}`.

    Raises:
        UserError: the file cannot be used; one line with its name and the reason.
    """
    path = Path(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise Unusable("it is empty")
            if size > MAX_FILE_BYTES:
                raise Unusable(f"its {size / 2**30:.0f} GiB are more than a checkpoint has")
            if path.suffix == ".safetensors":
                state = load_tensors(file, path, size)
            else:
                state = load_torch(file, size, checked=_verify(file, size))
        state = checked(state)
    except Unusable as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    weights(state, path=path)
    return state


def read_label(path: str | os.PathLike) -> dict[str, float] | None:
    """What `save` noted at the end of the file; None if it is not one of `save`'s. Verifies no digest."""
    with contextlib.suppress(OSError), open_file(path) as file:
        found = _find_comment(file, os.fstat(file.fileno()).st_size)
        return None if found is None else json.loads(found["label"])
    return None


def _find_comment(file: BinaryIO, size: int) -> re.Match[bytes] | None:
    file.seek(max(0, size - MAX_LABEL - END_RECORD - HEX_DIGITS))
    found = COMMENT.search(file.read())
    if found is None or len(found["comment"]) != struct.unpack("<H", found["length"])[0]:
        return None
    try:
        return found if not LABEL.problem(parse_json(found["label"])) else None
    except ValueError:
        return None


def _verify(file: BinaryIO, size: int) -> bool:
    """Whether the file is one of ours; its digest then holds."""
    found = _find_comment(file, size)
    if found is None:
        return False
    file.seek(0)
    digest, left = hashlib.sha256(), size - HEX_DIGITS
    while left:
        chunk = file.read(min(CHUNK, left))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    if digest.hexdigest().encode() != found["digest"]:
        raise Unusable("it is damaged: its content does not match its SHA-256")
    return True


def weights(
    state: dict[str, Any], ema: bool | None = None, path: str | os.PathLike = "checkpoint"
) -> dict[str, Tensor]:
    """The model's tensors by name, from any layout that `models` knows, without the prefixes of wrappers.

    Averages are under "model_ema" or "state_dict_ema".

    Args:
        state: what `load` returned.
        ema: the averaged weights (True), the trained ones (False), or the averaged if there are any (None).
        path: the file's name for the message.

    Raises:
        UserError: there are no such weights in it.
    """
    averaged = next((state[key] for key in EMA_KEYS if state.get(key)), None)
    if ema and averaged is None:
        raise UserError(f"{path}: it has no averaged (EMA) weights; use --no-ema")
    try:
        found = unwrap(averaged if averaged is not None and ema is not False else state)
    except AttributeError:  # a name that is no text
        found = {}
    if not found or not all(isinstance(value, Tensor) for value in found.values()):
        names = ", ".join(map(quote, itertools.islice(state, 12)))
        raise UserError(f"{path}: it has no model weights; its keys are {names}")
    return found
