"""Checkpoints on disk: written whole, checked when read, never executed.

A checkpoint is what `torch.save` writes, a zip archive, with a comment at its end that tells where the run
stood and a SHA-256 of every byte before it. Plain `torch.load(path, weights_only=True)` reads it too.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import pathlib
import pickletools
import re
import stat
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from utils import UserError, atomic_write, one_line, tell

MAX_FILE_BYTES = 64 * 2**30
MAX_PICKLE_BYTES = 16 * 2**20  # the structure without the tensors; 300 kB is usual
CHUNK = 2**20

# The end of a zip archive is a 22-byte record whose last two bytes count the bytes of the comment after it.
END_RECORD = 22
HEX_DIGITS = 64
COMMENT = re.compile(
    rb"PK\x05\x06.{16}(?P<length>..)(?P<comment>spectformer (?P<label>\{[^{}]*\}) "
    rb"sha256:(?P<digest>[0-9a-f]{64}))\Z",
    re.DOTALL,
)
MAX_LABEL = 2**10

# What a checkpoint of ours, of the authors (DeiT's), or of timm consists of. Nothing else is looked up.
SAFE_GLOBALS = {
    "collections.OrderedDict",
    "collections.Counter",
    "argparse.Namespace",
    "_codecs.encode",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    "torch.storage.UntypedStorage",
    "torch.torch_version.TorchVersion",
    *(
        f"torch.{name}Storage"
        for name in (
            "Float",
            "Double",
            "Half",
            "BFloat16",
            "Long",
            "Int",
            "Short",
            "Char",
            "Byte",
            "Bool",
            "ComplexFloat",
            "ComplexDouble",
        )
    ),
    *(
        f"torch.{name}"
        for name in (
            "float32",
            "float64",
            "float16",
            "bfloat16",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "bool",
            "complex64",
            "complex128",
        )
    ),
}
# Those of them that torch does not allow by itself.
_scalar = np.float64().__reduce__()[0]  # numpy's own rebuilding function; its module moved with numpy 2
NOT_TORCHS_OWN = [
    argparse.Namespace,
    torch.torch_version.TorchVersion,
    np.dtype,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(code)) for code in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u1", "?")),
    (pathlib.PosixPath, "pathlib.PosixPath"),
    (pathlib.PosixPath, "pathlib._local.PosixPath"),
]

# Keys whose type every user of a checkpoint may rely on, where they are there.
KEY_TYPES: dict[str, tuple[type, ...]] = {
    "optimizer": (dict,),
    "scaler": (dict,),
    "model_ema": (dict,),
    "meters": (dict,),
    "args": (dict,),
    "model_kwargs": (dict,),
    "epoch": (int,),
    "step": (int,),
    "best_epoch": (int,),
    "num_classes": (int,),
    "world_size": (int,),
    "best_acc1": (float, int),
    "crop_pct": (float, int),
    "arch": (str,),
    "interpolation": (str,),
    "mean": (list, tuple),
    "std": (list, tuple),
    "class_names": (list, tuple),
    "input_size": (int, list, tuple),
}
EMA_KEYS = ("model_ema", "state_dict_ema")
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


class _Unusable(Exception):
    """Why a file is refused; `load` adds its name."""


# ---------------------------------------------------------------------------------------------------- saving
def save(path: str | os.PathLike, state: Mapping[str, Any], label: Mapping[str, float] | None = None) -> None:
    """Write `state` to `path`, atomically, with its digest.

    Args:
        path: the file to replace.
        state: tensors, numbers, strings, None, and dicts, lists, tuples of them. numpy scalars, paths and
            namespaces are stored as their plain equivalents.
        label: numbers that `read_label` is to find without reading the file, beside `epoch` and `step`.

    Raises:
        MachineError: when the disk refuses; the old file is then unchanged.
        TypeError: for a value that could not be loaded again.
    """
    plain = _plain(state, "state")
    told = {key: plain[key] for key in ("epoch", "step") if key in plain} | dict(label or {})

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
        return {_plain(key, where): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
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


# --------------------------------------------------------------------------------------------------- loading
def load(path: str | os.PathLike, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint: ours, the authors', timm's, or a `.safetensors` file. Runs nothing that it holds.

    A digest, where there is one, is verified, and so are the checksums of a zip archive without one. A
    `.safetensors` file comes back as `{"model": tensors, **METADATA_KEYS that it has}`.

    Args:
        path: the file.
        map_location: where the tensors go.

    Raises:
        UserError: the file cannot be used; one line with its name and the reason.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _Unusable("it is not a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0:
                raise _Unusable("it is empty")
            if size > MAX_FILE_BYTES:
                raise _Unusable(f"its {size / 2**30:.0f} GiB are more than a checkpoint has")
            if path.suffix == ".safetensors":
                state = _load_safetensors(file, path, size, str(map_location))
            else:
                state = _load_torch(file, size, map_location)
        _check_content(state, size)
    except _Unusable as error:
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or one_line(error)}") from error
    weights(state, path=path)
    return state


def _load_torch(file: BinaryIO, size: int, map_location: str | torch.device) -> dict[str, Any]:
    head = file.read(512)
    label = _verify(file, size)
    if head.startswith(b"PK"):
        _check_archive(file, size, checked=label is not None)
    else:
        if head[257:262] == b"ustar":
            raise _Unusable("it is in torch's tar format of 2016; save it again with a newer torch")
        _check_stream(file)
    file.seek(0)
    try:
        with torch.serialization.safe_globals(NOT_TORCHS_OWN), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to, and all of it means the same
        raise _Unusable(f"its content cannot be read, it may be damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The gist of torch's error, without its paragraphs of advice."""
    text = str(error)
    found = re.search(r"WeightsUnpickler error: (.*)", text) or re.match(r"\s*(.*)", text)
    return one_line(found.group(1))[:200] or type(error).__name__


def read_label(path: str | os.PathLike) -> dict[str, float] | None:
    """What `save` noted at the end of the file; None if it is not one of `save`'s. Verifies no digest."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        found = _find_comment(file, os.fstat(file.fileno()).st_size)
        return None if found is None else json.loads(found["label"])
    return None


def _find_comment(file: BinaryIO, size: int) -> re.Match[bytes] | None:
    file.seek(max(0, size - MAX_LABEL - END_RECORD - HEX_DIGITS))
    found = COMMENT.search(file.read())
    if found is None or len(found["comment"]) != struct.unpack("<H", found["length"])[0]:
        return None
    try:
        label = json.loads(found["label"])
    except ValueError:
        return None
    return found if all(isinstance(value, (int, float)) for value in label.values()) else None


def _verify(file: BinaryIO, size: int) -> dict[str, float] | None:
    """The label of a file of ours, whose digest holds; None for a file that is not ours."""
    found = _find_comment(file, size)
    if found is None:
        return None
    file.seek(0)
    digest, left = hashlib.sha256(), size - HEX_DIGITS
    while left:
        chunk = file.read(min(CHUNK, left))
        if not chunk:
            break
        digest.update(chunk)
        left -= len(chunk)
    if digest.hexdigest().encode() != found["digest"]:
        raise _Unusable("it is damaged: its content does not match its SHA-256")
    return json.loads(found["label"])


def _check_archive(file: BinaryIO, size: int, checked: bool) -> None:
    """Refuse what torch's own zip reader would accept although no `torch.save` wrote it."""
    if not checked:
        file.seek(max(0, size - END_RECORD))
        end = file.read()
        # A file without our comment ends with the end record; ours with a damaged comment does not.
        if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")):
            raise _Unusable("it is damaged: the end of the file is missing or changed")
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickled = _check_entries(entries, size)
            if not checked and (bad := archive.testzip()):
                raise _Unusable(f"it is damaged: the checksum of {bad} does not match")
            _check_pickle(io.BytesIO(archive.read(pickled)))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise _Unusable(f"it is damaged: {one_line(error)}") from error


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> zipfile.ZipInfo:
    """The entry with the pickle, if all entries are what a checkpoint has."""
    names = [entry.filename for entry in entries]
    root = names[0].split("/")[0] if names else ""
    if any(name.split("/")[0] != root for name in names) or len(set(names)) != len(names):
        raise _Unusable("it is a zip archive, but not a checkpoint")
    for entry in entries:
        if "\\" in entry.filename or ".." in entry.filename.split("/") or entry.filename.startswith("/"):
            raise _Unusable(f"its entry {entry.filename!r} would leave the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise _Unusable(f"its entry {entry.filename!r} is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise _Unusable("its entries claim to be larger than the file")
    pickled = next((entry for entry in entries if entry.filename == f"{root}/data.pkl"), None)
    if pickled is None:
        raise _Unusable("it is a zip archive, but not a checkpoint")
    if pickled.file_size > MAX_PICKLE_BYTES:
        raise _Unusable(
            f"its structure takes {pickled.file_size / 2**20:.0f} MiB, "
            f"more than the {MAX_PICKLE_BYTES / 2**20:.0f} allowed"
        )
    return pickled


def _check_stream(file: BinaryIO) -> None:
    """The same for torch's format before 1.6: five pickles (the fourth is the state), then the storages."""
    file.seek(0)
    for _ in range(5):
        _check_pickle(file)


def _check_pickle(stream: BinaryIO) -> None:
    """Refuse a pickle that asks for anything but SAFE_GLOBALS, before any of it is interpreted.

    torch's restricted unpickler is the lock; this names what was asked for, and keeps away the harmless
    callables through which a small file can ask for a lot of memory.
    """
    try:
        for opcode, argument, position in pickletools.genops(stream):
            if position == 0 and opcode.name != "PROTO":
                raise _Unusable("it is not a checkpoint")
            if opcode.name == "GLOBAL":
                name = argument.replace(" ", ".", 1)
                if name not in SAFE_GLOBALS:
                    raise _Unusable(f"it asks for {name[:100]!r}, which no checkpoint needs; nothing was run")
            elif opcode.name in ("STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX"):
                raise _Unusable(f"its pickle uses {opcode.name}, which torch.save does not; nothing was run")
    except (ValueError, IndexError, MemoryError, OverflowError) as error:  # a length can be any
        raise _Unusable("it is not a checkpoint, or it is damaged") from error


def _check_content(state: Any, size: int) -> None:
    """Refuse values whose type or size nobody who uses the checkpoint would expect."""
    if not isinstance(state, dict):
        raise _Unusable(f"it holds a {type(state).__name__}, not the dict that a checkpoint is")
    for key, value in state.items():
        if not isinstance(key, str):
            raise _Unusable(f"its key {str(key)[:50]!r} is not a name")
        if isinstance(value, argparse.Namespace):
            state[key] = value = vars(value)
        types = KEY_TYPES.get(key)
        if types and value is not None and (isinstance(value, bool) or not isinstance(value, types)):
            wanted = " or ".join(t.__name__ for t in types)
            raise _Unusable(f"its {key!r} is a {type(value).__name__}, not {wanted}")
        if types == (int,) and value is not None and value < (-1 if key == "best_epoch" else 0):
            raise _Unusable(f"its {key!r} is {value}")
    for tensor in _tensors(state):
        if max(tensor.nbytes, tensor.untyped_storage().nbytes()) > size:
            raise _Unusable(f"a tensor of shape {tuple(tensor.shape)} is larger than the file")


def _tensors(root: object) -> Iterator[Tensor]:
    """All tensors in nested containers; each container is visited once, however often it is referred to."""
    waiting, seen = [root], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple, argparse.Namespace)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, argparse.Namespace):
                value = vars(value)
            waiting.extend(value.values() if isinstance(value, dict) else value)


# --------------------------------------------------------------------------------------------------- weights
def weights(
    state: dict[str, Any], ema: bool | None = None, path: str | os.PathLike = "checkpoint"
) -> dict[str, Tensor]:
    """The model's tensors by name, from any layout.

    Knows `{"model": tensors}`, `{"model": {"state_dict": tensors}}`, `{"state_dict": tensors}`, the
    tensors alone, and averages under "model_ema" or "state_dict_ema".

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
    found = averaged if averaged is not None and ema is not False else state
    for _ in range(2):
        inner = (found[key] for key in ("model", "state_dict") if isinstance(found.get(key), dict))
        found = next(inner, found)
    if not found or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items()):
        raise UserError(f"{path}: it has no model weights; its keys are {', '.join(list(state)[:12])}")
    return found


# ----------------------------------------------------------------------------------------------- safetensors
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
        raise _Unusable("it is damaged: its SHA-256 is missing")
    return 8 + found.start(1)


def _verify_tensors(file: BinaryIO, size: int) -> None:
    head = file.read(8)
    head += file.read(min(int.from_bytes(head, "little"), size, MAX_PICKLE_BYTES))
    start = _tensor_digest_place(head)
    if start is None:
        return
    digest = hashlib.sha256(head[:start] + b"0" * HEX_DIGITS + head[start + HEX_DIGITS :])
    while chunk := file.read(CHUNK):
        digest.update(chunk)
    if digest.hexdigest().encode() != head[start : start + HEX_DIGITS]:
        raise _Unusable("it is damaged: its content does not match its SHA-256")


def _load_safetensors(file: BinaryIO, path: Path, size: int, device: str) -> dict[str, Any]:
    _verify_tensors(file, size)
    try:
        with safetensors.safe_open(path, "pt", device=device) as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
        ours = TENSOR_DIGEST in metadata
        return {"model": tensors} | {
            key: json.loads(metadata[key]) for key in METADATA_KEYS if ours and key in metadata
        }
    except (safetensors.SafetensorError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise _Unusable(f"it is not a safetensors file, or it is damaged: {one_line(error)[:200]}") from error


# --------------------------------------------------------------------------------------- which to go on from
def newest_valid(directory: str | os.PathLike) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint of a run directory that is furthest in training, of those that are intact.

    Says on stderr which files it passed over, and why. Between equals the one written last is taken.

    Raises:
        UserError: there are checkpoints, but none that can be used; starting anew would overwrite them.
    """
    candidates = sorted(Path(directory).glob("checkpoint*.pth"))
    placed = []
    for path in candidates:
        with _passing_over(path):
            placed.append((_position(path), path))
    for _, path in sorted(placed, reverse=True):
        with _passing_over(path):
            return path, load(path)
    if candidates:
        raise UserError(
            f"{directory}: none of its {len(candidates)} checkpoints can be used; move them away to start anew"
        )
    return None


@contextlib.contextmanager
def _passing_over(path: Path) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        reason = str(error).removeprefix(f"{path}: ")
        tell(f"passing over {path}: {reason}")


def _position(path: Path) -> tuple[float, float, float]:
    """(epoch, step, time of writing) of a checkpoint, without reading all of it if it is one of ours."""
    told = read_label(path)
    if told is None or not {"epoch", "step"} <= told.keys():
        told = load(path)
        if not {"epoch", "step"} <= told.keys():
            raise UserError(f"{path}: it does not say from where to go on")
    return told["epoch"], told["step"], os.stat(path).st_mtime
