"""Row 22: what a checkpoint or a flag says of a model opens no connection, and no file that nobody named."""

from __future__ import annotations

import json

import hostile
import pytest
from harness import TINY, count

from runtime import checkpoints


@pytest.mark.promise(22)
def test_a_models_arguments_open_nothing(launcher, tmp_path, flags, images, trained, record):
    canary = tmp_path / "canary"
    canary.write_bytes(b"secret")
    state = checkpoints.load(trained / "checkpoint_last.pth")
    train = ["main_spectformer", *TINY, *flags, "--output-dir", str(tmp_path / "run")]
    image = str(next(images.rglob("*.png")))
    cases, named = [], []
    for arch in ("spectformer_xs", "resnet10t"):
        for number, (argument, value) in enumerate(hostile.foreign(canary)):
            path = tmp_path / f"{arch}{number}.pth"
            kwargs = state["model_kwargs"] if arch == state["arch"] else {}
            path.write_bytes(
                hostile.with_our_digest(state | {"arch": arch, "model_kwargs": kwargs | {argument: value}})
            )
            for command in (
                ["infer", "--model-path", str(path), "--image", image],
                [*train, "--arch", arch, "--finetune", str(path)],
                [*train, "--resume", str(path)],
            ):
                cases.append(command)
                named.append(path.name)
            cases.append([*train, "--arch", arch, "--model-kwargs", f"{argument}={value!r}"])
            named.append("--model-kwargs")
    step = max(1, len(cases) // count(24, len(cases)))
    cases, named = cases[::step], named[::step]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    report = tmp_path / "report.json"
    child = launcher.start(
        "children:watched", tmp_path, cases=str(tmp_path / "cases.json"), forbidden=str(canary), report=str(report)
    )
    assert child.wait(600) == 0, child.err
    failures = [
        f"{case[-4:]}: {result}"
        for case, name, result in zip(cases, named, json.loads(report.read_text()), strict=True)
        if result["opened"] or result["code"] != 2 or name not in result["err"]
    ]
    record(
        "checkpoints and flags with timm's own arguments, each refused without a request or a look",
        len(cases),
        failures,
    )
