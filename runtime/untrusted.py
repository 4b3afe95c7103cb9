"""Files of anyone's making, checked before anything in them is interpreted."""

import argparse
import io
import pathlib
import re
import struct
import warnings
import zipfile
from typing import Any, BinaryIO

import numpy as np
import torch

from runtime.pickles import MAX_PICKLE_BYTES, PickleChecker, Unusable
from utils import one_line, quote

MAX_DIRECTORY_BYTES = 8 * 2**20  # the list of an archive's entries, one a tensor
MAX_COMMENT = 2**16
END = b"PK\x05\x06"  # of a zip archive: a record of 22 bytes, then a comment
END_RECORD = 22
LARGE_END, LARGE_RECORDS = b"PK\x06\x06", 56 + 20  # of more than 4 GiB: two records before it

# What checkpoints call, and torch does not allow by itself.
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


def load_torch(file: BinaryIO, size: int, checked: bool = False) -> Any:
    """What `torch.save` wrote to a file of `size` bytes; tensors come to the CPU.

    Args:
        file: open for reading.
        size: of the file, in bytes.
        checked: its content is known to be what was written; else the checksums of an archive are verified.

    Raises:
        Unusable: it is damaged, or holds what no `torch.save` of a checkpoint writes. Nothing was run.
    """
    file.seek(0)
    head = file.read(512)
    if head.startswith(b"PK"):
        _check_archive(file, size, checked)
    else:
        if head[257:262] == b"ustar":
            raise Unusable("it is in torch's tar format of 2016; save it again with a newer torch")
        _check_stream(file, size)
    file.seek(0)
    try:
        with torch.serialization.safe_globals(NOT_TORCHS_OWN), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the damage leads to, and all of it means the same
        raise Unusable(f"its content cannot be read, it may be damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The gist of torch's error, without its paragraphs of advice."""
    text = str(error)
    found = re.search(r"WeightsUnpickler error: (.*)", text) or re.match(r"\s*(.*)", text)
    return one_line(found.group(1))[:200] or type(error).__name__


def _check_archive(file: BinaryIO, size: int, checked: bool) -> None:
    """Refuse what torch's own zip reader would accept although no `torch.save` wrote it."""
    _check_end(file, size, checked)
    try:
        with zipfile.ZipFile(file) as archive:
            pickled = _check_entries(archive.infolist(), size)
            if not checked and (bad := archive.testzip()):
                raise Unusable(f"it is damaged: the checksum of {quote(bad)} does not match")
            PickleChecker(size).check(io.BytesIO(archive.read(pickled)))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise Unusable(f"it is damaged: {one_line(error)}") from error


def _check_end(file: BinaryIO, size: int, checked: bool) -> None:
    """Look at the records at an archive's end, before the list of its entries is read into memory."""
    start = max(0, size - MAX_COMMENT - END_RECORD - LARGE_RECORDS)
    file.seek(start)
    tail = file.read()
    end = tail.rfind(END)
    # A file without our comment ends with the end record; ours with a damaged comment does not.
    if not checked and (end < 0 or end + END_RECORD != len(tail) or not tail.endswith(b"\0\0")):
        raise Unusable("it is damaged: the end of the file is missing or changed")
    (listed,) = struct.unpack_from("<L", tail, end + 12)
    if tail[max(0, end - 20) :].startswith(b"PK\x06\x07"):
        if end < LARGE_RECORDS or not tail[end - LARGE_RECORDS :].startswith(LARGE_END):
            raise Unusable("it is damaged: the end of the file is missing or changed")
        (listed,) = struct.unpack_from("<Q", tail, end - LARGE_RECORDS + 40)
    if listed > min(MAX_DIRECTORY_BYTES, size):
        raise Unusable(f"the list of its entries takes {listed / 2**20:,.0f} MiB")


def _check_entries(entries: list[zipfile.ZipInfo], size: int) -> zipfile.ZipInfo:
    """The entry with the pickle, if all entries are what a checkpoint has."""
    names = [entry.filename for entry in entries]
    root = names[0].split("/")[0] if names else ""
    # torch finds an entry whatever the case of its name.
    if any(name.split("/")[0] != root for name in names) or len({name.casefold() for name in names}) != len(names):
        raise Unusable("it is a zip archive, but not a checkpoint")
    for entry in entries:
        if "\\" in entry.filename or ".." in entry.filename.split("/") or entry.filename.startswith("/"):
            raise Unusable(f"its entry {quote(entry.filename)} would leave the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise Unusable(f"its entry {quote(entry.filename)} is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise Unusable("its entries claim to be larger than the file")
    pickled = next((entry for entry in entries if entry.filename == f"{root}/data.pkl"), None)
    if pickled is None:
        raise Unusable("it is a zip archive, but not a checkpoint")
    if pickled.file_size > MAX_PICKLE_BYTES:
        raise Unusable(
            f"its structure takes {pickled.file_size / 2**20:.0f} MiB, "
            f"more than the {MAX_PICKLE_BYTES / 2**20:.0f} allowed"
        )
    return pickled


def _check_stream(file: BinaryIO, size: int) -> None:
    """The same for torch's format before 1.6: five pickles (the fourth is the state), then the storages."""
    file.seek(0)
    start = io.BytesIO(file.read(MAX_PICKLE_BYTES))
    checker = PickleChecker(size)
    for _ in range(5):
        checker.check(start)
