"""Rows 9 and 15: a file or flag that does not fit is named in one line."""

from __future__ import annotations

import json
from pathlib import Path

import mutations
import pytest
import torch
from harness import TINY, Launcher, count, one_line

from runtime import checkpoints

# kind of mutation -> how many in a reduced and in a full run
MUTATED = {
    "resume": (40, 500),
    "infer": (40, 500),
    "finetune": (15, 300),
    "bytes": (30, 400),
    "foreign": (30, 300),
}


def refused(result: dict, *named: str) -> bool:
    """Whether a command ended as the user's mistake: exit 2 and one line with every name and a reason."""
    told = result["err"]
    return (
        result["code"] == 2
        and one_line(told)
        and all(name in told for name in named)
        and len(told) > 15 + sum(map(len, named))
    )


def run_all(launcher: Launcher, tmp_path: Path, cases: list[list[str]]) -> list[dict]:
    """The results of command lines, [main, argument...] each."""
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    child = launcher.start(
        "children:commands",
        directory=tmp_path,
        cases=str(tmp_path / "cases.json"),
        report=str(tmp_path / "results.json"),
    )
    assert child.wait(600) == 0, child.err
    return json.loads((tmp_path / "results.json").read_text())


@pytest.mark.promise(9)
@pytest.mark.parametrize("kind", MUTATED)
def test_a_spoiled_checkpoint_is_told_in_one_line(launcher, tmp_path, flags, trained, unfinished, images, record, kind):
    target, source = tmp_path / "spoiled.pth", trained / "checkpoint_last.pth"
    image = str(next(images.rglob("*.png")))
    train = [*TINY, *flags, "--output-dir", str(tmp_path / "run")]
    commands = {
        "resume": ["main_spectformer", *train, "--resume", str(target)],
        "finetune": ["main_spectformer", *train, "--finetune", str(target), "--classifier", "new"],
    }
    main, *argv = commands.get(kind, ["infer", "--model-path", str(target), "--image", image])
    if kind == "resume":
        source = unfinished / "checkpoint_last.pth"
    elif kind == "foreign":  # as torch.save writes it: without a digest
        source = tmp_path / "foreign.pth"
        state = checkpoints.load(trained / "checkpoint_last.pth")
        torch.save(
            {key: state[key] for key in ("model", "arch", "model_kwargs", "num_classes", "input_size")},
            source,
        )
    child = launcher.start(
        "children:mutated_checkpoints",
        kind="bytes" if kind == "foreign" else kind,
        number=count(*MUTATED[kind]),
        source=str(source),
        target=str(target),
        main=main,
        argv=argv,
        report=str(tmp_path / "results.json"),
    )
    assert child.wait(900) == 0, child.err
    intact, *results = json.loads((tmp_path / "results.json").read_text())
    assert intact["code"] in (0, "accepted"), intact
    # Without a digest, a byte that nothing depends on may change (a date): the answer then is the same.
    failures = [
        f"{result['label']}: {result['code']}, {result['err'][-600:] or result['out']}"
        for result in results
        if not refused(result, str(target))
        and not (kind == "foreign" and result["code"] == 0 and result["out"] == intact["out"])
    ]
    record("spoiled checkpoints: exit 2, file and reason in one line", len(results), failures)


@pytest.mark.promise(9)
def test_a_wrong_flag_or_config_is_told_in_one_line(launcher, tmp_path, images, record):
    cases = list(mutations.command_lines(count(150, 500), tmp_path))
    base = [
        "main_spectformer",
        *TINY,
        "--data-set",
        "FOLDER",
        "--data-path",
        str(images),
        "--output-dir",
        str(tmp_path / "run"),
    ]
    results = run_all(launcher, tmp_path, [[*base, *argv] for _, argv in cases])
    failures = [
        f"{argv}, which should name {named}: {result['code']}, {result['err'][-600:]}"
        for (named, argv), result in zip(cases, results, strict=True)
        if not refused(result, named)
    ]
    record("wrong flags and configs: exit 2, flag or key and reason in one line", len(cases), failures)


def edited(source: Path, target: Path, edit) -> str:
    """A copy of a checkpoint, changed by ``edit(state)``; its digest holds."""
    state = checkpoints.load(source)
    edit(state)
    checkpoints.save(target, state)
    return str(target)


@pytest.mark.promise(15)
def test_a_mismatch_is_told_with_its_keys(launcher: Launcher, tmp_path, trained, unfinished, images, record):
    last, resumed = trained / "checkpoint_last.pth", str(unfinished / "checkpoint_last.pth")
    whole = str(last)
    no_ema = edited(last, tmp_path / "no_ema.pth", lambda s: s.pop("model_ema"))
    less = edited(last, tmp_path / "less.pth", lambda s: (s.pop("model_ema"), s["model"].pop("norm.weight")))
    more = edited(last, tmp_path / "more.pth", lambda s: (s.pop("model_ema"), s["model"].update(extra=torch.zeros(1))))
    other = edited(
        last,
        tmp_path / "other.pth",
        lambda s: (s.pop("model_ema"), s["model"].update({"norm.weight": torch.zeros(7)})),
    )
    lean = edited(Path(resumed), tmp_path / "lean.pth", lambda s: s.pop("optimizer"))
    bare = tmp_path / "bare.pth"
    torch.save(checkpoints.load(last)["model"], bare)
    half = tmp_path / "half"
    for split in ("train", "val"):
        for label in (0, 1):
            folder = half / split / f"class{label}"
            folder.mkdir(parents=True)
            for image in (images / split / f"class{label}").glob("*.png"):
                (folder / image.name).write_bytes(image.read_bytes())
    image = str(next(images.rglob("*.png")))
    train = [
        "main_spectformer",
        *TINY,
        "--data-set",
        "FOLDER",
        "--data-path",
        str(images),
        "--batch-size",
        "4",
        "--accum-iter",
        "2",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    wider = ["--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2", "alpha=1", "mlp_ratio=2"]
    deeper = ["--model-kwargs", "embed_dim=16", "depth=3", "num_heads=2", "alpha=1", "mlp_ratio=2"]
    soft = ["--distillation-type", "soft", "--teacher-model", "spectformer_ti", "--teacher-path", whole]
    infer = ["infer", "--num-workers", "0", "--model-path"]
    # Each with what the line has to name beside the file.
    cases = [
        ([*train, "--resume", resumed, *wider], [resumed, "model_kwargs", "embed_dim"]),
        ([*train, "--resume", resumed, *deeper], [resumed, "model_kwargs", "depth"]),
        ([*train, "--resume", resumed, "--arch", "spectformer_ti"], [resumed, "arch", "spectformer_ti"]),
        ([*train, "--resume", resumed, "--input-size", "48"], [resumed, "input_size", "48"]),
        ([*train, "--resume", resumed, "--data-path", str(half)], [resumed, "num_classes", "2"]),
        ([*train, "--resume", resumed, "--no-model-ema"], [resumed, "--model-ema"]),
        ([*train, "--resume", no_ema], [no_ema, "--no-model-ema"]),
        ([*train, "--resume", resumed, "--opt", "sgd"], [resumed, "--opt adamw"]),
        ([*train, "--resume", resumed, "--accum-iter", "3"], [resumed, "8 images", "--batch-size"]),
        ([*train, "--resume", lean], [lean, "optimizer"]),
        ([*train, "--resume", str(bare)], [str(bare), "args", "--finetune"]),
        ([*train, "--finetune", whole, *wider], [whole, "patch_embed.proj.weight", "32"]),
        ([*train, "--finetune", whole, *deeper], [whole, "missing", "blocks.2"]),
        ([*train, "--finetune", less], [less, "missing", "norm.weight"]),
        ([*train, "--finetune", more], [more, "unexpected", "extra"]),
        ([*train, "--finetune", other], [other, "norm.weight", "7"]),
        ([*train, *soft], [whole, "patch_embed.proj.weight"]),
        ([*train, "--eval", "--resume", whole, *wider], [whole, "patch_embed.proj.weight"]),
        ([*infer, no_ema, "--ema", "--image", image], [no_ema, "EMA"]),
        ([*infer, less, "--image", image], [less, "missing", "norm.weight"]),
        ([*infer, more, "--image", image], [more, "unexpected", "extra"]),
        ([*infer, other, "--image", image], [other, "norm.weight", "7"]),
        ([*infer, whole, "--arch", "svt_h_s", "--image", image], [whole, "svt_h_s"]),
        ([*infer, whole, "--data-set", "DIGITS"], [whole, "10", "4"]),
    ]
    assert len(cases) >= 20
    results = run_all(launcher, tmp_path, [argv for argv, _ in cases])
    failures = [
        f"{' '.join(argv[-6:])}, which should name {named}: {result['code']}, {result['err'][-600:]}"
        for (argv, named), result in zip(cases, results, strict=True)
        if not refused(result, *named)
    ]
    record(
        "mismatches (classes, arch, size, keys, EMA, optimiser, teacher): exit 2 with the keys",
        len(cases),
        failures,
    )
