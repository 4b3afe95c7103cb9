"""Files made to run code, to fill the memory or to write elsewhere when they are loaded as a checkpoint."""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import pickle
import pickletools
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime import checkpoints


class Call:
    """Pickles to a call of ``function(*arguments)``."""

    def __init__(self, function: Callable, *arguments: Any):
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.reduced


def by_name(module: str, name: str, *arguments: str, protocol: int = 2) -> bytes:
    """A pickle that calls ``module.name(*arguments)``, whether or not that can be imported here."""
    if protocol >= 4:
        head = b"\x80\x04" + _text(module) + _text(name) + b"\x93"
    else:
        head = b"\x80\x02" + f"c{module}\n{name}\n".encode()
    return head + b"(" + b"".join(_text(argument) for argument in arguments) + b"tR."


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def in_zip(pickled: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> bytes:
    """An archive as torch.save writes it, around a given pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/byteorder", b"little")
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(value: Any, **how: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def with_our_digest(value: Any) -> bytes:
    """What `checkpoints.save` would write of a state that it refuses to write: the digest holds."""
    buffer = io.BytesIO()
    archive = checkpoints._Archive(buffer)
    torch.save(value, archive)
    archive.finish({"epoch": 1, "step": 0})
    return buffer.getvalue()


def foreign(canary: Path) -> Iterator[tuple[str, Any]]:
    """(name, value) of arguments by which timm would find weights, files and servers."""
    yield "pretrained", True
    for field in ("url", "file", "hf_hub_id", "hf_hub_filename", "custom_load", "source", "state_dict"):
        value = {"url": "http://127.0.0.1:9/weights.pth", "hf_hub_id": "a/b"}.get(field, str(canary))
        yield "pretrained_cfg", {field: value}
        yield "pretrained_cfg_overlay", {field: value}
    yield "checkpoint_path", str(canary)
    yield "cache_dir", str(canary)
    yield "pretrained_strict", False
    yield "pretrained_filter_fn", "os.system"
    yield "features_only", True
    yield "kwargs_filter", ["depth"]


def executing(marker: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of files that create ``marker`` if anything in them runs."""
    shell = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    calls = {
        "os.system": Call(os.system, shell),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(marker), "w"),
        "os.mkdir": Call(os.mkdir, str(marker)),
        "getattr": Call(getattr(os, "popen"), shell),  # noqa: B009
    }
    for name, call in calls.items():
        for wrapped, state in (
            ("whole", call),
            ("model", {"model": call}),
            ("args", {"model": {}, "args": call}),
        ):
            if name in ("os.system", "eval") or wrapped == "model":
                yield f"{name} as {wrapped}", saved(state)
    state = {"model": {"w": torch.zeros(2)}, "args": Call(os.system, shell)}
    yield "legacy format", saved(state, _use_new_zipfile_serialization=False)
    yield "a valid digest", with_our_digest(state)
    yield "an OrderedDict that holds a call", saved(collections.OrderedDict(model=Call(os.system, shell)))
    yield "a Namespace that holds a call", saved({"args": argparse.Namespace(lr=Call(os.system, shell))})
    yield "a bare pickle", pickle.dumps(state["args"])
    for name, arguments in {
        "posix.system": (shell,),
        "subprocess.getoutput": (shell,),
        "builtins.eval": (code,),
        "builtins.__import__": ("os",),
        "runpy.run_path": (str(marker),),
        "pty.spawn": (shell,),
        "code.interact": (),
        "timeit.timeit": (code,),
        "cProfile.run": (code,),
        "shutil.rmtree": (str(marker),),
        "importlib.import_module": ("antigravity",),
        "torch.load": (str(marker),),
        "torch.hub.load": ("x", "y"),
        "torch.serialization.load": (str(marker),),
        "numpy.load": (str(marker),),
        "torch._utils._rebuild_device_tensor_from_numpy": ("x",),
        "torch.jit.load": (str(marker),),
        "torch.distributed.rpc.rpc_sync": ("x", "y"),
        "_pickle.loads": ("x",),
        "operator.attrgetter": ("x",),
        "functools.partial": ("x",),
        "numpy.testing._private.utils.runstring": (code, "x"),
        "torch.utils._config_module.load_config": ("x",),
        "argparse.FileType": ("w",),
        "argparse.ArgumentParser": (),
        "pathlib.Path": (str(marker),),
        "collections.namedtuple": ("x", code),
    }.items():
        module, _, attribute = name.rpartition(".")
        yield name, in_zip(by_name(module, attribute, *arguments))
        if module in ("posix", "builtins"):
            yield f"{name} by STACK_GLOBAL", in_zip(by_name(module, attribute, *arguments, protocol=4))
            yield (
                f"{name}, dotted",
                in_zip(by_name("torch", f"serialization.{module}.{attribute}", *arguments)),
            )
    yield "INST", in_zip(b"(" + b"S" + repr(shell).encode() + b"\niposix\nsystem\n.")
    yield "OBJ", in_zip(b"(cposix\nsystem\nS" + repr(shell).encode() + b"\no.")
    yield "extension registry", in_zip(b"\x80\x02\x82\x01(tR.")
    yield "persistent id of a call", in_zip(b"\x80\x02" + by_name("posix", "system", shell)[2:-1] + b"Q.")
    yield (
        "BUILD on an allowed class",
        in_zip(b"\x80\x02cargparse\nNamespace\n)\x81}" + _text("__class__") + b"cposix\nsystem\nsb."),
    )
    yield "an object array", saved({"model": np.array([Call(os.system, shell)], dtype=object)})
    yield "a scripted module", scripted()
    yield "a tar archive", tar_of(shell)
    yield "nested pickles", pickle.dumps(b"") + by_name("posix", "system", shell)
    yield "a second pickle behind the first", in_zip(saved_pickle({}) + by_name("posix", "system", shell))
    yield "a safetensors header that lies", struct.pack("<Q", 2**60) + b"{}"


def saved_pickle(value: Any) -> bytes:
    return pickletools.optimize(pickle.dumps(value, protocol=2))


def scripted() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "version"):
            archive.writestr(f"archive/{name}", b"3\n" if name == "version" else saved_pickle({}))
        archive.writestr("archive/code/__torch__.py", "import os")
    return buffer.getvalue()


def tar_of(shell: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = by_name("posix", "system", shell)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def exhausting() -> Iterator[tuple[str, bytes]]:
    """(name, content) of small files that ask for a lot of memory or time."""
    zeros = bytes(64 << 20)
    yield "a compressed pickle of 64 MiB", in_zip(zeros, zipfile.ZIP_DEFLATED)
    yield (
        "a compressed storage of 64 MiB",
        in_zip(saved_pickle({"model": {}}), zipfile.ZIP_DEFLATED, **{"archive/data/0": zeros}),
    )
    expanded = torch.zeros(1).expand(1 << 40)
    yield "a tensor of 4 TiB in 4 bytes", saved({"model": {"w": expanded}})
    yield "a tensor of 4 TiB, digest valid", with_our_digest({"model": {"w": expanded}})
    yield "overlapping entries", overlapping()
    yield (
        "a long integer of a claimed 2 GiB",
        in_zip(b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"\x01."),
    )
    yield "a string of a claimed 4 GiB", in_zip(b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.")
    yield "a memo index of 4 billion", in_zip(b"\x80\x02}r" + struct.pack("<I", 2**32 - 1) + b".")
    yield "lists nested 100,000 deep", in_zip(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    yield "lists that double 60 times", in_zip(doubling(60))
    yield (
        "many bytes by _codecs.encode",
        in_zip(b"\x80\x02c_codecs\nencode\n(" + _text("x" * 1000) + _text("no_such_codec") + b"tR."),
    )
    yield (
        "300 kB that a codec takes a minute for",
        in_zip(b"\x80\x02}" + _text("model") + by_name("_codecs", "encode", "é" * 150_000, "punycode")[2:-1] + b"s."),
    )
    yield "15 million empty dicts", in_zip(b"\x80\x02(" + b"}" * 15_000_000 + b"t.")
    yield "a tensor of 2**62 entries in 4 bytes", saved({"model": {"w": torch.zeros(1).expand(1 << 62)}})
    yield "a storage with a claimed 2**60 elements", claimed(2**60)
    yield "a tensor with a negative size", claimed(-5)
    yield "a safetensors header of 2 GiB", struct.pack("<Q", 2**31) + b"{" * 1000
    yield "a million empty tuples", in_zip(b"\x80\x02(" + b")" * 1_000_000 + b"t.")


def doubling(times: int) -> bytes:
    """A list of two references to a list of two references to ...: 2**times leaves."""
    body = b"]q\x00"
    for number in range(times):
        before, after = bytes([number]), bytes([number + 1])
        body += b"]q" + after + b"(h" + before + b"h" + before + b"e"
    return b"\x80\x02" + body + b"."


def claimed(size: int) -> bytes:
    """A checkpoint whose tensor's storage claims another number of elements than its entry has."""
    content = saved({"model": {"w": torch.zeros(200)}})
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        pickled = archive.read("archive/data.pkl")
        storage = archive.read("archive/data/0")
    number = b"K\xc8"  # BININT1 200: the storage's number of elements and the tensor's size
    long = pickle.dumps(size, protocol=2)[2:-1]
    return in_zip(pickled.replace(number, long), **{"archive/data/0": storage})


def overlapping() -> bytes:
    """A zip whose directory lists one stored entry a thousand times (the entries' sizes add up to a lot)."""
    content = in_zip(saved_pickle({"model": {}}), **{"archive/data/0": bytes(1 << 20)})
    start = content.index(b"PK\x01\x02")
    end = content.index(b"PK\x05\x06")
    directory = content[start:end] * 1000
    closing = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 4000, 4000, len(directory), start, 0)
    return content[:start] + directory + closing


def escaping(outside: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of archives with entries that name a file outside."""
    up = "../" * 12 + str(outside).lstrip("/")
    for label, entry in {
        "parents": f"archive/{up}",
        "an absolute path": str(outside),
        "a drive": "C:\\evil",
        "backslashes": f"archive\\{up}",
    }.items():
        yield f"entry with {label}", in_zip(saved_pickle({"model": {}}), **{entry: b"evil"})
    content = json.dumps(
        {
            "__metadata__": {"format": "../../evil"},
            "../../evil": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        }
    ).encode()
    yield "a safetensors name with parents", struct.pack("<Q", len(content)) + content + bytes(4)
