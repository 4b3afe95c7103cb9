"""Stanford Cars with its annotations in cars_anno.pkl, of which nothing is executed."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from inputs.image_sets import ImageDataset, ImageFiles, class_number
from inputs.request import Request
from runtime.files import read_file
from utils import UserError, one_line

PICKLE = "cars_anno.pkl"
MAX_BYTES = 64 * 2**20


def cars_with_pickle(request: Request) -> ImageDataset:
    """cars_anno.pkl: {"train": entries, "test": entries}, or a list of entries with a test flag at the end.

    An entry is (file, label[, test]), or a dict with "fname" or "relative_im_path" and "class"[, "test"] as
    in the devkit; labels count from 0 or from 1. Files are looked for as given, and below train/, test/,
    cars_train/ and cars_test/.
    """
    path = request.root / PICKLE
    try:
        entries = _entries(_read_plain_pickle(path))
        first_label = min(label for _, label, _ in entries)
        last_label = max(label for _, label, _ in entries)
    except (TypeError, ValueError, KeyError, IndexError) as error:
        raise UserError(
            f"{path}: expected {{'train': [(file, label), …], 'test': […]}} or a list of "
            f"(file, label, is_test), found something else ({error!r})"
        ) from error
    if first_label not in (0, 1):
        raise UserError(f"{path}: labels should count from 0 or 1, the smallest is {first_label}")
    folders = ("train", "cars_train", "") if request.train else ("test", "cars_test", "")
    chosen = [(file, label - first_label) for file, label, test in entries if test != request.train]
    paths = [_find_file(request, file, folders) for file, _ in chosen]
    return ImageFiles(
        paths, [label for _, label in chosen], [f"{i + 1:03d}" for i in range(last_label - first_label + 1)]
    )


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings and containers. All else needs a class or a function, and those it refuses."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it wants {module}.{name}; lists, dicts, strings and numbers are read")


def _read_plain_pickle(path: Path) -> Any:
    """The object in a pickle of plain containers, strings and numbers.

    Raises:
        UserError: the file is damaged, too large, or holds anything else.
    """
    try:
        return _PlainUnpickler(io.BytesIO(read_file(path, MAX_BYTES))).load()
    except Exception as error:  # a damaged stream makes the unpickler fail in any way
        raise UserError(f"{path}: not a readable annotation file: {one_line(error)}") from error


def _entries(content: dict | list) -> list[tuple[str, int, bool]]:
    if isinstance(content, dict):
        return [
            (*_entry(entry)[:2], test) for test, key in ((False, "train"), (True, "test")) for entry in content[key]
        ]
    return [_entry(entry) for entry in content]


def _entry(entry: Sequence | dict) -> tuple[str, int, bool]:
    if isinstance(entry, dict):
        file = entry["fname"] if "fname" in entry else entry["relative_im_path"]
        return str(file), class_number(entry["class"]), bool(entry.get("test", False))
    return str(entry[0]), class_number(entry[1]), bool(entry[-1]) if len(entry) > 2 else False


def _find_file(request: Request, file: str, folders: Sequence[str]) -> str:
    for folder in folders:
        if (request.root / folder / file).is_file():
            return str(request.root / folder / file)
    raise request.missing(f"{file}, which its annotations name, in {' or '.join(f or '.' for f in folders)}")
