"""Rows 8 and 10: a damaged checkpoint is noticed, a hostile one runs nothing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import hostile
import pytest
from harness import TINY, Launcher, count, one_line

from runtime import checkpoints
from utils import UserError


def flips(content: bytes, number: int) -> Iterator[tuple[str, bytes]]:
    """One bit flipped, anywhere; every byte of the first and last hundred comes first."""
    drawn = random.Random("flips")
    edges = [*range(100), *range(len(content) - 100, len(content))]
    for i in range(number):
        place = edges[i // 2] if i % 2 and i // 2 < len(edges) else drawn.randrange(len(content))
        bit = drawn.randrange(8)
        yield (
            f"bit {bit} of byte {place}",
            content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :],
        )


def truncations(content: bytes, number: int) -> Iterator[tuple[str, bytes]]:
    drawn = random.Random("truncations")
    lengths = [0, 1, *(len(content) - n for n in range(1, 100))]
    for i in range(number):
        length = lengths[i // 2] if i % 2 and i // 2 < len(lengths) else drawn.randrange(len(content))
        yield f"the first {length} bytes", content[:length]


def zeroed(content: bytes, number: int) -> Iterator[tuple[str, bytes]]:
    """A run of zeros over bytes that were not all zeros, as lost sectors are."""
    drawn = random.Random("zeros")
    while number:
        length = drawn.choice([1, 16, 512, 4096])
        start = drawn.randrange(len(content) - 1)
        changed = content[:start] + bytes(len(content[start : start + length])) + content[start + length :]
        if changed != content:
            number -= 1
            yield f"{length} zeros from byte {start}", changed


@pytest.mark.promise(8)
@pytest.mark.parametrize(
    ("damage", "reduced", "full"),
    [(flips, 200, 2000), (truncations, 50, 500), (zeroed, 50, 500)],
    ids=["bit flips", "truncations", "zeroed runs"],
)
def test_damage_is_noticed(trained: Path, tmp_path: Path, record, damage, reduced, full):
    content = (trained / "checkpoint_last.pth").read_bytes()
    path = tmp_path / "checkpoint_last.pth"
    failures, total = [], 0
    for what, damaged in damage(content, count(reduced, full)):
        total += 1
        path.write_bytes(damaged)
        try:
            checkpoints.load(path)
            failures.append(f"{what}: loaded")
        except UserError as error:
            if str(path) not in str(error) or "\n" in str(error):
                failures.append(f"{what}: {error}")
    record(f"{damage.__name__} of a checkpoint that were noticed", total, failures)


@pytest.mark.promise(8)
def test_resume_takes_the_newest_that_is_intact(launcher: Launcher, trained, tmp_path, flags, record):
    failures = []
    kinds = [next(flips(b"x" * 10**4, 1)), next(truncations(b"x" * 10**4, 1)), ("empty", b"")]
    for number, (what, _) in enumerate(kinds):
        directory = tmp_path / f"damaged{number}"
        shutil.copytree(trained, directory)
        spoiled = [
            directory / "checkpoint_last.pth",
            directory / "checkpoint_0003.pth",
            *directory.glob("*best*"),
        ]
        damage = [flips, truncations, lambda content, n: iter([("empty", b"")])][number]
        for path in spoiled:
            path.write_bytes(next(damage(path.read_bytes(), 1))[1])
        (child,) = launcher.complete(directory, *flags, "--resume", "auto", "--checkpoint-epochs", "1")
        if not all(path.name in child.err for path in spoiled) or "checkpoint_0002" not in child.out + child.err:
            failures.append(f"{what}: said {child.err!r}")
        if checkpoints.load(directory / "checkpoint_last.pth")["epoch"] != 3:
            failures.append(f"{what}: the run did not finish")
    record("runs resumed from the newest intact checkpoint, the damaged ones named", len(kinds), failures)


@pytest.mark.promise(10)
def test_a_hostile_checkpoint_runs_nothing(launcher: Launcher, tmp_path: Path, record):
    marker, report = tmp_path / "executed", tmp_path / "report.json"
    cases = list(hostile.executing(marker))
    cases += [(f"escape: {name}", content) for name, content in hostile.escaping(marker)]
    cases += [(f"bomb: {name}", content) for name, content in hostile.exhausting()]
    paths = []
    for number, (name, content) in enumerate(cases):
        paths.append(tmp_path / f"hostile{number}.{'safetensors' if 'safetensors' in name else 'pth'}")
        paths[-1].write_bytes(content)
    # No file here is larger than 16 MB: 512 MiB are plenty to refuse it.
    child = launcher.start("children:load_all", paths=[str(path) for path in paths], report=str(report), memory=512)
    assert child.wait(300) == 0, child.err
    failures = []
    harmless = ("escape: a safetensors name with parents",)  # a tensor's name is never a file's
    for (name, _), path, result in zip(cases, paths, json.loads(report.read_text()), strict=True):
        refused = result["outcome"] == "refused" and str(path) in result["message"] and "\n" not in result["message"]
        if not refused and name not in harmless:
            failures.append(f"{name}: {result}")
    if marker.exists():
        failures.append("something was executed")
    assert len(cases) >= 30
    record(
        "hostile files (code, bombs, paths) refused by name, nothing executed, within 512 MiB",
        len(cases),
        failures,
    )


@pytest.mark.promise(10)
def test_no_entry_point_falls_back_to_unsafe_loading(launcher: Launcher, tmp_path, flags, record):
    marker, report = tmp_path / "executed", tmp_path / "report.json"
    path, config = tmp_path / "hostile.pth", tmp_path / "hostile.yaml"
    path.write_bytes(dict(hostile.executing(marker))["os.system as model"])
    config.write_text(f"epochs: !!python/object/apply:os.system ['touch {marker}']\n")
    run = ["main_spectformer", *TINY, *flags, "--output-dir", str(tmp_path / "run")]
    teacher = [
        "--distillation-type",
        "soft",
        "--teacher-model",
        "spectformer_xs",
        "--teacher-path",
        str(path),
    ]
    cases = [
        [*run, "--resume", str(path)],
        [*run, "--finetune", str(path)],
        [*run, *teacher],
        [*run, "--config", str(config)],
        ["main_transfer", *run[1:], "--finetune", str(path)],
        ["infer", "--model-path", str(path), "--data-set", "DIGITS"],
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    child = launcher.start("children:commands", cases=str(tmp_path / "cases.json"), report=str(report))
    assert child.wait() == 0, child.err
    failures = [
        f"{case}: {result}"
        for case, result in zip(cases, json.loads(report.read_text()), strict=True)
        if result["code"] != 2 or "hostile" not in result["err"] or not one_line(result["err"])
    ]
    if marker.exists():
        failures.append("something was executed")
    record("ways to hand a hostile file to the project, each refused in one line", len(cases), failures)
