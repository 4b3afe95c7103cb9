"""Which checkpoint a run goes on from, and what becomes of the others.

A run writes its checkpoints along one line, its branch. Going on from the last of them continues the branch. Going
on from an earlier one, or from another directory's, begins a new one. The rule, in which no work is overwritten,
deleted, or taken for another branch's:

1. A checkpoint records its lineage: the branches that led to it, the oldest first, each with its number and the
   epoch and step at which it began. A branch's number is the time at which it began, so that later ones are larger;
   a file's label has that of its last branch. Files of before there was a lineage are of branch 0.
2. A file belongs to the past of a checkpoint if its branch is in that one's lineage, and it is no later than the
   beginning of the next branch, or than the checkpoint itself.
3. When a run begins, or goes on from a checkpoint (`begin`), the files that do not belong to its past are set
   aside: moved, by their names, into a folder `abandoned_01` of the run directory, beside log.txt and the best
   checkpoints of the common past, which the new branch will replace. Such a folder is like any run directory to go
   on from.
4. `--resume auto` (`newest_valid`) goes on from the branch that began last, from the furthest of its intact
   files, and of equals from the one written last.

The moves are noted down before the first. A run that is killed among them has them finished by the next that holds
the directory (`finish_moves`): at every moment auto finds either all of the old branch, or nothing of it beyond the
point to go on from.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from runtime.checkpoints import load, read_label
from runtime.files import read_file
from runtime.schema import Items, Text, parse_json
from utils import UserError, atomic_write, cannot_write, make_directory, sync_directory, tell

CHECKPOINTS = "checkpoint*.pth"
BEST, BESTS = "checkpoint_best.pth", "checkpoint_best*.pth"
ABANDONED = "abandoned_"
MOVES = "moves.json"
LOG = "log.txt"


class Place(NamedTuple):
    """Where a branch began, or a checkpoint stands. Places of a branch are in the order of training."""

    branch: int
    epoch: int
    step: int


Lineage = tuple[Place, ...]


def lineage_of(state: Mapping[str, Any]) -> Lineage:
    """The branches that led to a checkpoint."""
    return tuple(Place(*began) for began in state.get("lineage", [(0, 0, 0)]))


def begin(directory: Path, state: Mapping[str, Any] | None) -> tuple[Lineage, Path]:
    """Begin a run in a directory that this process holds, from the checkpoint `state` or from nothing.

    Returns:
        What the run's checkpoints have to record as their "lineage", and the directory whose log.txt tells of
        the epochs before: the run's own, or an abandoned one that the checkpoint is in.

    Raises:
        MachineError: a file cannot be moved; the next run will.
    """
    here = _places(directory.glob(CHECKPOINTS))
    abandoned = _places(directory.glob(f"{ABANDONED}*/{CHECKPOINTS}"))
    lineage = () if state is None else lineage_of(state)
    place = Place(-1, 0, 0) if state is None else _place_in(state)
    strangers = [path for path, other in here.items() if not _belongs(other, lineage, place)]
    if strangers:
        folder = _set_aside(directory, strangers)
        tell(f"{directory}: {len(strangers)} checkpoints that do not lead to this run were moved to {folder.name}")
    known = [*here.values(), *abandoned.values()]
    if place in here.values() and max(other for other in known if other.branch == place.branch) == place:
        return lineage, directory
    newest = max((other.branch for other in [*known, *lineage]), default=0)
    began = Place(max(time.time_ns(), newest + 1), place.epoch, place.step)
    holders = [path.parent for path, other in [*here.items(), *abandoned.items()] if other == place]
    return (*lineage, began), next(iter(holders), directory)


def _belongs(other: Place, lineage: Lineage, place: Place) -> bool:
    """Whether a checkpoint at `other` belongs to the past of one at `place`."""
    ends = [began[1:] for began in lineage[1:]] + [place[1:]]
    return any(other.branch == began.branch and other[1:] <= end for began, end in zip(lineage, ends, strict=False))


def holds(path: Path, state: Mapping[str, Any]) -> bool:
    """Whether a file holds this checkpoint, or the end of an older branch that is the beginning of its own."""
    other, place = _places([path]).get(path), _place_in(state)
    return other is not None and _belongs(other, lineage_of(state), place) and other[1:] == place[1:]


def _places(paths: Iterable[Path]) -> dict[Path, Place]:
    """Where those files stand that say so."""
    places = {}
    for path in paths:
        with contextlib.suppress(UserError):
            places[path] = place_of(path)
    return places


def _place_in(state: Mapping[str, Any]) -> Place:
    """Where a checkpoint that was read stands."""
    return Place(lineage_of(state)[-1].branch, state["epoch"], state["step"])


def place_of(path: Path) -> Place:
    """Where a checkpoint stands, without reading all of it if it is one of ours.

    Raises:
        UserError: it cannot be read, or does not say.
    """
    told = read_label(path)
    if told is None or not {"epoch", "step"} <= told.keys():
        told = load(path)
        if not {"epoch", "step"} <= told.keys():
            raise UserError(f"{path}: it does not say from where to go on")
        return _place_in(told)
    return Place(told.get("branch", 0), told["epoch"], told["step"])


def newest_valid(directory: str | os.PathLike) -> tuple[Path, dict[str, Any]] | None:
    """The intact checkpoint of a run directory to go on from, by the rule above; None if there is none.

    Says on stderr which files it passed over, and why.

    Raises:
        UserError: there are checkpoints, but none that can be used; starting anew would overwrite them.
    """
    candidates = sorted(Path(directory).glob(CHECKPOINTS))
    placed = []
    for path in candidates:
        with _passing_over(path):
            placed.append((place_of(path), os.stat(path).st_mtime, path))
    for *_, path in sorted(placed, reverse=True):
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


# --------------------------------------------------------------------------------------------- setting aside
def _set_aside(directory: Path, paths: Iterable[Path]) -> Path:
    """Move checkpoints of a run directory into a new folder of it, and copy there what a new branch will replace.

    What is killed meanwhile can be finished.
    """
    number = 1
    while (folder := directory / f"{ABANDONED}{number:02d}").exists():
        number += 1
    make_directory(folder)
    with contextlib.suppress(FileNotFoundError):
        atomic_write(folder / LOG, (directory / LOG).read_bytes())
    for path in set(directory.glob(BESTS)) - set(paths):
        atomic_write(folder / path.name, path.read_bytes())
    atomic_write(folder / MOVES, json.dumps([path.name for path in paths]))
    _finish(folder)
    return folder


def finish_moves(directory: Path) -> None:
    """Set aside what a run that was killed had begun to; to be called by whoever holds the directory, first of all.

    Raises:
        MachineError: a file cannot be moved.
        UserError: somebody changed the note of what to move.
    """
    for folder in sorted(directory.glob(f"{ABANDONED}*")):
        if (folder / MOVES).exists():
            _finish(folder)


def _finish(folder: Path) -> None:
    note = folder / MOVES
    try:
        names = parse_json(read_file(note, 2**20))
        if Items(Text()).problem(names) or not all(fnmatch(name, CHECKPOINTS) and "/" not in name for name in names):
            raise ValueError("not the names of checkpoints")
    except (OSError, ValueError) as error:
        raise UserError(f"{note}: it is not the list of files to move that a run wrote; move it away") from error
    try:
        for name in names:
            if (folder.parent / name).exists():
                os.rename(folder.parent / name, folder / name)
        for changed in (folder, folder.parent):
            sync_directory(changed)
        note.unlink()
        sync_directory(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
