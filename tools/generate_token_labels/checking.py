"""Which label maps are whole, and what is wrong with the others."""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from inputs.label_maps import read_label_map
from utils import UserError

NAMED = 20  # bad maps that --check lists of each kind


class MapFiles(Dataset):
    """What is wrong with each label map, None where nothing is."""

    def __init__(self, paths: Sequence[Path], num_classes: int):
        self.paths = paths
        self.num_classes = num_classes

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> str | None:
        try:
            read_label_map(self.paths[index], self.num_classes)
        except UserError as error:
            return str(error)
        return None


def problems(paths: Sequence[Path], num_classes: int, workers: int, show: bool) -> Iterator[str | None]:
    """What is wrong with each map, in order."""
    loader = DataLoader(MapFiles(paths, num_classes), batch_size=64, num_workers=workers, collate_fn=list)
    with tqdm(desc="reading maps", total=len(paths), unit=" maps", disable=not show) as bar:
        for found in loader:
            bar.update(len(found))
            yield from found


def check(args: argparse.Namespace, paths: Sequence[Path], num_classes: int) -> None:
    """Name what is wrong with the maps; raises UserError if anything is."""
    if not args.output_dir.is_dir():
        raise UserError(f"--output-dir {args.output_dir}: no such folder")
    bad = Counter()
    for path, problem in zip(paths, problems(paths, num_classes, args.num_workers, show=True), strict=True):
        if problem is not None:
            complain(bad, "damaged or mismatched" if path.exists() else "missing", problem)
    expected = set(map(str, paths))
    for file in sorted(args.output_dir.rglob("*.pt")):
        if str(file) not in expected:
            complain(bad, "of no image", f"{file}: there is no image for this label map")
    if bad:
        summary = ", ".join(f"{count} {kind}" for kind, count in bad.items())
        raise UserError(f"--output-dir {args.output_dir}: of {len(paths)} label maps {summary}")
    print(f"{len(paths)} label maps in {args.output_dir}, all whole and for these {num_classes} classes")


def complain(bad: Counter, kind: str, problem: str) -> None:
    bad[kind] += 1
    if bad[kind] <= NAMED:
        tqdm.write(problem)
