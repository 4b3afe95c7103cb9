"""Row 21: whatever is wrong with a file or a flag, it takes bounded time and memory, and one line to say so."""

from __future__ import annotations

import json
import shutil

import pytest
import wrong_inputs
from coco_example import write_example
from harness import TINY, count

# How many inputs of each kind in a full run; a reduced one tries a fortieth.
INPUTS = {
    "fields of checkpoints, in prediction": 1600,
    "fields of checkpoints, in resuming": 1600,
    "fields of checkpoints, in fine-tuning": 1000,
    "settings of configs": 1200,
    "fields of a run's args.yaml": 800,
    "rows of log.txt": 800,
    "flags of training": 1200,
    "flags of detection": 400,
    "flags of infer.py": 600,
    "label maps": 1000,
    "annotations": 1000,
    "shards": 600,
    "images": 600,
}
MEBIBYTES, SECONDS = 1024, 10  # more than before an input, and of the processor's time


@pytest.mark.promise(21)
@pytest.mark.parametrize("kind", wrong_inputs.KINDS)
def test_a_wrong_input_is_refused_in_one_line_within_bounds(
    launcher, tmp_path, flags, images, unfinished, record, kind
):
    scratch = tmp_path / "a" / "b"  # words for places to write may go up
    scratch.mkdir(parents=True)
    sources = {
        "train": ["main_spectformer", *TINY, *flags, "--output-dir", str(tmp_path / "new")],
        "run": str(shutil.copytree(unfinished, tmp_path / "run", ignore=shutil.ignore_patterns("*lock*"))),
        "image": str(next(images.rglob("*.png"))),
        "coco": str(write_example(tmp_path / "coco", train=4, val=2, scale=4)),
    }
    number = count(INPUTS[kind] // 40, INPUTS[kind])
    child = launcher.start(
        "children:wrong",
        scratch,
        kind=kind,
        number=number,
        sources=sources,
        memory=MEBIBYTES,
        seconds=SECONDS,
        report=str(tmp_path / "results.json"),
    )
    code = child.wait(1800)
    assert code == 0, f"exit {code}: {child.err[-2000:]}"
    results = json.loads((tmp_path / "results.json").read_text())
    failures = [
        f"{result['label']}: {result['outcome']}, {result['message']}"
        for result in results
        if result["outcome"] not in ("accepted", "refused")
    ]
    assert any(result["outcome"] == "refused" for result in results)
    longest = max(result["seconds"] for result in results)
    record(
        f"{kind}: accepted or refused in one line, within {MEBIBYTES} MiB and {SECONDS} s", number, failures, longest
    )
