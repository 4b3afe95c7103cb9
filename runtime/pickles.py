"""What a pickle would do, worked out without doing it.

torch's restricted unpickler is the lock: nothing outside its list is ever called. But a small file can ask that
unpickler for a lot of time or memory, by the callables on the list, by tensors larger than what is stored, or by
sheer number. Here the same instructions run on stand-ins first: every name, argument and size is known before
anything is made.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from utils import quote

MAX_PICKLE_BYTES = 16 * 2**20  # the structure without the tensors; 300 kB is usual
MAX_OPCODES = 2**20  # of all pickles of a file; 27 a tensor are usual, 59,000 for SVT-H-B with all that a run saves
MAX_WORK = 2**24  # entries and characters handed to callables
MAX_SHARING = 16  # bytes of all tensors together, times the file's
MAX_KEY = 2**60  # larger integers can be chosen so that all have one hash
MAX_DIMENSIONS = 64
STORAGES = {
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
    "Bool": torch.bool,
}
ENTRY_BYTES = {f"torch.{name}Storage": dtype.itemsize for name, dtype in STORAGES.items()}
ENTRY_BYTES["torch.storage.UntypedStorage"] = 1


class Unusable(Exception):
    """Why a file is refused, as one line; who opened it adds its name."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A global that the pickle looks up."""

    path: str


@dataclass(slots=True)
class _Box:
    """A dict, a list, or what a call made; `size` counts the entries."""

    kind: str
    size: int = 0


@dataclass(frozen=True, slots=True)
class _Storage:
    entries: int
    entry_bytes: int


def _is(*kinds: type | tuple[type, ...]) -> Callable[[tuple], bool]:
    """Whether arguments are of these kinds, one each."""
    return lambda args: len(args) == len(kinds) and all(map(isinstance, args, kinds))


def _is_dtype(args: tuple) -> bool:
    return args[1:] == (False, True) and re.fullmatch(r"[biufc?]\d{0,2}", args[0]) is not None


# What a checkpoint of ours, of the authors (DeiT's) or of timm calls, and whether it may with these arguments.
CALLS: dict[str, Callable[[tuple], bool]] = {
    "collections.OrderedDict": _is(),
    "collections.Counter": _is(_Box),
    "argparse.Namespace": _is(),
    "_codecs.encode": lambda args: _is(str, str)(args) and args[1] == "latin1",
    "pathlib.PosixPath": lambda args: all(isinstance(part, str) for part in args),
    "numpy.dtype": _is_dtype,
    "numpy.core.multiarray.scalar": _is(_Box, _Box),
    "torch._utils._rebuild_tensor": _is(_Storage, int, tuple, tuple),
    "torch._utils._rebuild_tensor_v2": _is(_Storage, int, tuple, tuple, bool, _Box),
    "torch._utils._rebuild_parameter": _is(_Box, bool, _Box),
    "torch.Size": _is(tuple),
    "torch.device": lambda args: _is(str)(args) or _is(str, int)(args),
    "torch.torch_version.TorchVersion": _is(str),
}
# Names that moved.
CALLS["pathlib._local.PosixPath"] = CALLS["pathlib.PosixPath"]
CALLS["numpy._core.multiarray.scalar"] = CALLS["numpy.core.multiarray.scalar"]
KNOWN = CALLS.keys() | ENTRY_BYTES.keys() | set(map(str, STORAGES.values()))

LITERALS = {"BININT", "BININT1", "BININT2", "BINUNICODE", "SHORT_BINSTRING", "BINFLOAT", "LONG1"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
MADE = {"EMPTY_DICT": "dict", "EMPTY_LIST": "list"}
DICTS = ("dict", "collections.OrderedDict", "collections.Counter")


class PickleChecker:
    """Runs the pickles of one file of `size` bytes on stand-ins."""

    def __init__(self, size: int):
        self._size = size
        self._opcodes = self._work = self._stored = self._rebuilt = 0
        self._storages: dict[Any, _Storage] = {}

    def check(self, stream: io.BytesIO) -> None:
        """Read one pickle to its end.

        Raises:
            Unusable: it is none, or it asks for what no checkpoint needs.
        """
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks under a mark
        self._memo: dict[int, Any] = {}
        try:
            for opcode, argument, position in pickletools.genops(stream):
                if position == 0 and opcode.name != "PROTO":
                    raise Unusable("it is not a checkpoint")
                self._opcodes += 1
                if self._opcodes > MAX_OPCODES:
                    raise Unusable(f"its structure has more than {MAX_OPCODES:,} parts")
                self._run(opcode.name, argument)
        # An instruction without what it needs; a length can be any.
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            raise Unusable("it is not a checkpoint, or it is damaged") from error

    def _run(self, opcode: str, argument: Any) -> None:
        stack = self._stack
        if opcode in LITERALS:
            stack.append(argument)
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif opcode in ("BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif opcode in CONSTANTS:
            stack.append(CONSTANTS[opcode])
        elif opcode in MADE:
            stack.append(_Box(MADE[opcode]))
        elif opcode == "MARK":
            self._below.append(stack)
            self._stack = []
        elif opcode == "TUPLE":
            self._stack = self._below.pop()
            self._stack.append(tuple(stack))
        elif opcode in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(opcode[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif opcode in ("SETITEM", "SETITEMS", "APPEND", "APPENDS"):
            self._fill(opcode)
        elif opcode == "GLOBAL":
            stack.append(self._look_up(argument.replace(" ", ".", 1)))
        elif opcode in ("REDUCE", "NEWOBJ"):
            args = stack.pop()
            stack[-1] = self._call(stack[-1], args)
        elif opcode == "BUILD":
            self._build(stack.pop(), stack[-1])
        elif opcode == "BINPERSID":
            stack[-1] = self._storage(*stack[-1])
        elif opcode not in ("PROTO", "STOP"):
            raise Unusable(
                f"it is not a checkpoint: its pickle uses {opcode}, which torch.save does not; nothing was run"
            )

    def _look_up(self, path: str) -> _Name:
        if path not in KNOWN:
            raise Unusable(f"it asks for {quote(path)}, which no checkpoint needs; nothing was run")
        return _Name(path)

    def _fill(self, opcode: str) -> None:
        """Entries for a dict or a list."""
        count = 2 if opcode == "SETITEM" else 1
        if opcode.endswith("S"):  # as many as there are since the mark
            items, self._stack = self._stack, self._below.pop()
        else:
            items, self._stack[-count:] = self._stack[-count:], []
        box = self._stack[-1]
        if opcode.startswith("APPEND"):
            fits = box.kind == "list"
        else:
            fits = box.kind in DICTS and len(items) % 2 == 0 and all(map(_is_key, items[::2]))
        if not fits:
            raise Unusable("its content is not what a checkpoint consists of")
        box.size += len(items)

    def _call(self, called: _Name, args: tuple) -> _Box:
        allowed = CALLS.get(called.path)
        if allowed is None or not allowed(args):
            raise Unusable(f"it calls {called.path} as no checkpoint does; nothing was run")
        self._spend(args)
        if called.path.startswith("torch._utils._rebuild_tensor"):
            self._rebuild(*args[:4])
        return _Box(called.path, sum(map(_extent, args)))

    def _build(self, state: Any, box: _Box) -> None:
        if box.kind == "numpy.dtype":
            # (3, byte order, no fields, ...): the numbers at the end are sizes, and -1 where there are no fields.
            allowed = state[0] == 3 and state[1] in ("<", ">", "|", "=") and state[2:] == (None, None, None, -1, -1, 0)
        else:
            allowed = box.kind in ("argparse.Namespace", "collections.OrderedDict") and state.kind == "dict"
        if not allowed:
            raise Unusable(f"it builds a {box.kind} as no checkpoint does; nothing was run")
        self._spend((state,))

    def _spend(self, args: tuple) -> None:
        self._work += sum(map(_extent, args))
        if self._work > MAX_WORK:
            raise Unusable("it makes the same things too often")

    def _storage(self, what: str, kind: _Name, key: Any, location: str, entries: int, *view: Any) -> _Storage:
        """A piece of the file that tensors lie in."""
        entry_bytes = ENTRY_BYTES.get(kind.path)
        known = what == "storage" and entry_bytes is not None and _is((str, int), str)((key, location))
        if not known or type(entries) is not int or entries < 0 or view not in ((), (None,)):
            raise Unusable("it is not a checkpoint, or it is damaged")
        storage = _Storage(entries, entry_bytes)
        if self._storages.setdefault(key, storage) is storage:
            self._stored += entries * entry_bytes
        if self._stored > self._size:
            raise Unusable("it may be damaged: what it says to hold is larger than the file")
        return self._storages[key]

    def _rebuild(self, storage: _Storage, offset: int, size: tuple, stride: tuple) -> None:
        """Refuse a tensor with more entries than its storage or the file has, before any memory is asked for."""
        if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
            raise Unusable("it is not a checkpoint, or it is damaged")
        if any(type(number) is not int or number < 0 for number in (offset, *size, *stride)):
            raise Unusable(f"a tensor has the shape {quote(size)}, strides {quote(stride)}")
        entries = math.prod(size)
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if (entries and last >= storage.entries) or entries * storage.entry_bytes > self._size:
            raise Unusable(f"a tensor of shape {quote(size)} is larger than the file")
        self._rebuilt += entries * storage.entry_bytes
        if self._rebuilt > MAX_SHARING * self._size:
            raise Unusable("its tensors are together much larger than the file")


def _is_key(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and abs(value) < MAX_KEY)


def _extent(value: Any) -> int:
    """How much there is to read of an argument."""
    if isinstance(value, (str, tuple)):
        return 1 + len(value)
    return 1 + value.size if isinstance(value, _Box) else 1
