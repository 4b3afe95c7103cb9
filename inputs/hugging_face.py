"""Hugging Face data sets, read by position from the Arrow files that their package keeps on disk.

The root's module `datasets` has the name of Hugging Face's package, which therefore never runs in this process:
`locate_hugging_face` asks it once, in a process of its own, where the files are. They are read with pyarrow.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from inputs.image_sets import ImageDataset, count_classes
from inputs.images import BadImage, read_image
from inputs.request import Request
from utils import UserError, one_line

if TYPE_CHECKING:
    import pyarrow

LOCATE = Path(__file__).with_name("locate_hugging_face.py")


class ArrowImages:
    """Images in the record batches of Arrow files, which each process maps into its memory for itself."""

    def __init__(
        self, name: str, files: Sequence[str], image_column: str, label_column: str, class_names: Sequence[str] | None
    ):
        """class_names: None to name the classes by their numbers. Raises UserError for labels that are no classes."""
        self._name = name
        self._files = tuple(files)
        self._image_column = image_column
        self._batches = _record_batches(self._files)
        self._ends = np.cumsum([len(batch) for batch in self._batches])
        self.labels = _labels(self._batches, label_column)
        named = tuple(class_names or ())
        self.class_names = named + tuple(str(i) for i in range(len(named), count_classes(self.labels)))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_batches": None}  # a started process would be sent the images themselves

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _batches=_record_batches(state["_files"]))

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> tuple[Image.Image, int]:
        batch = int(np.searchsorted(self._ends, index, side="right"))
        row = index - int(self._ends[batch])  # from the batch's end
        stored = self._batches[batch].column(self._image_column)[row].as_py() or {}
        if stored.get("bytes"):
            source = io.BytesIO(stored["bytes"])
        elif stored.get("path"):
            source = stored["path"]
        else:
            raise BadImage(f"{self.path(index)}: there is no image in this row")
        return read_image(source, self.path(index)), int(self.labels[index])

    def path(self, index: int) -> str:
        return f"{self._name}[{index}]"


def _record_batches(files: Sequence[str]) -> list[pyarrow.RecordBatch]:
    import pyarrow  # comes with Hugging Face's package, which only these data sets need

    # Without threads of its own it can be used on both sides of a fork.
    options = pyarrow.ipc.IpcReadOptions(use_threads=False)
    return [
        batch
        for file in files
        for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(file), options=options)
        if len(batch)
    ]


def _labels(batches: Sequence[pyarrow.RecordBatch], column: str) -> np.ndarray:
    parts = [batch.column(column) for batch in batches]
    if any(part.null_count for part in parts):
        raise UserError(f"column {column!r}: some rows have no label")
    numbers = [part.to_numpy(zero_copy_only=False) for part in parts] or [np.zeros(0, np.int64)]
    if not all(np.issubdtype(part.dtype, np.integer) for part in numbers):
        raise UserError(f"column {column!r}: holds {parts[0].type} and not class numbers; make it a ClassLabel")
    return np.concatenate(numbers).astype(np.int64)


def hugging_face(request: Request) -> ImageDataset:
    """hfds/NAME of the Hub, or hfds/PATH of a local folder, also one written by `save_to_disk`.

    The columns are `image` and `label`, or the only ones of their kinds. --data-path is where the package keeps
    what it downloads and prepares (default: its own cache); nothing is written into a local data set's folder.
    """
    try:
        found = _locate(request)
        name = f"{request.name}/{found['split']}"
        dataset = ArrowImages(name, found["files"], found["image"], found["label"], found["class_names"])
    except (UserError, ValueError, OSError, ImportError) as error:
        raise UserError(f"--data-set {request.name}: {one_line(error)}") from error
    if len(dataset) != found["rows"]:
        raise UserError(f"--data-set {request.name}: its files hold {len(dataset)} rows, not {found['rows']}")
    return dataset


def _locate(request: Request) -> dict[str, Any]:
    """The answer of `locate_hugging_face`; raises UserError with its reason."""
    name = request.name.partition("/")[2]
    splits = ("train",) if request.train else ("validation", "val", "test")
    command = [sys.executable, "-P", str(LOCATE), name, _cache(name, request.root), *splits]
    # Its progress and warnings go to stderr as they come; it cannot ask anything.
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    if done.returncode != 0:
        raise UserError(f"reading it ended with code {done.returncode}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer


def _cache(name: str, root: Path | None) -> str:
    """The folder to prepare the data set in, "" for Hugging Face's own, which it is for --data-path in the data."""
    data = Path(name).resolve()
    inside = root is not None and data.is_dir() and root.resolve().is_relative_to(data)
    return "" if root is None or inside else str(root)
