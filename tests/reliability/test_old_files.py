"""Row 16: checkpoints of the authors, in every layout they come in, and of this project's first version."""

from __future__ import annotations

import argparse
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from harness import TINY, differences, digest, outcome
from test_bad_input import run_all

import models
from models.convert import to_original
from models.loading import load_weights
from runtime import checkpoints

# Of this project's first version, and of the last one before its code was arranged anew.
OLD_VERSIONS = [Path(__file__).with_name(f"{name}.ckpt") for name in ("first_version", "before_the_rooms")]
PYRAMID = {
    "embed_dims": (8, 16, 16, 32),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 2, 2),
    "mlp_ratios": (2, 2, 2, 2),
    "spectral_depths": (1, 1, 0, 0),
    "img_size": 64,
    "num_classes": 5,
}
# Small models of every kind of file that the authors have published.
MODELS = {
    "spectformer_xs": {
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "alpha": 1,
        "img_size": 64,
        "num_classes": 5,
    },
    "spectformer_h_s": PYRAMID | {"token_label": True},
    "svt_h_s": PYRAMID,
}
ARGS = argparse.Namespace(lr=5e-4, model="spectformer", output_dir=Path("/out"), drop=0.0)
LAYOUTS: dict[str, Callable[[dict], dict]] = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights},
    "state_dict": lambda weights: {"state_dict": weights},
    "model.state_dict": lambda weights: {"model": {"state_dict": weights}},
    "DDP's prefix": lambda weights: {"state_dict": {f"module.{name}": value for name, value in weights.items()}},
    "an OrderedDict": lambda weights: OrderedDict(model=OrderedDict(weights)),
    "DeiT's training state": lambda weights: {
        "model": weights,
        "optimizer": {"state": {}, "param_groups": []},
        "lr_scheduler": {"last_epoch": 3},
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": ARGS,
    },
    "timm's training state": lambda weights: {
        "epoch": 3,
        "arch": "x",
        "state_dict": {name: value + 1 for name, value in weights.items()},
        "state_dict_ema": weights,
        "args": ARGS,
        "metric": 84.2,
        "version": 2,
    },
}


@pytest.mark.promise(16)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_the_authors_checkpoints_load_in_every_layout(tmp_path: Path, record, legacy):
    failures, total = [], 0
    assert models.ARCHITECTURES
    for name, kwargs in MODELS.items():
        torch.manual_seed(0)
        model, loaded = timm.create_model(name, **kwargs), timm.create_model(name, **kwargs)
        for names, weights in (
            ("the authors'", to_original(model.state_dict())),
            ("ours", model.state_dict()),
        ):
            for layout, wrap in LAYOUTS.items():
                total += 1
                path = tmp_path / "checkpoint.pth.tar"
                torch.save(wrap(dict(weights)), path, _use_new_zipfile_serialization=not legacy)
                for value in loaded.state_dict().values():
                    value.zero_()
                left = load_weights(loaded, checkpoints.weights(checkpoints.load(path)))
                if left or digest(loaded.state_dict()) != digest(model.state_dict()):
                    failures.append(f"{name} as {layout}, {names} names: {left} or values differ")
    record("files in the authors' layouts that loaded bit for bit", total, failures)


@pytest.mark.promise(16)
@pytest.mark.parametrize("version", OLD_VERSIONS, ids=lambda path: path.stem)
def test_a_run_of_an_old_version_goes_on(launcher, tmp_path, flags, images, record, version):
    """The file was saved after 6 of 12 updates, by `main_spectformer.py` with the flags of `harness.TINY`."""
    file = str(version)
    image = str(next(images.rglob("*.png")))
    base = ["main_spectformer", *TINY, *flags, "--output-dir", str(tmp_path / "run")]
    results = run_all(
        launcher,
        tmp_path,
        [
            [*base, "--resume", file],
            [*base, "--finetune", file],
            [*base, "--eval", "--resume", file],
            ["infer", "--model-path", file, "--image", image],
        ],
    )
    failures = [
        str(result)
        for result, code in zip(results, ("accepted", "accepted", 0, 0), strict=True)
        if result["code"] != code
    ]
    # Two ways to go on have to meet; they are not compared with what another machine's arithmetic makes.
    for workers in (0, 2):
        launcher.complete(tmp_path / f"run{workers}", *flags, "--resume", file, workers=workers)
    if wrong := differences(outcome(tmp_path / "run0"), outcome(tmp_path / "run2")):
        failures.append(f"{wrong} differ")
    if checkpoints.load(tmp_path / "run0" / "checkpoint_last.pth")["updates"] != 12:
        failures.append("it did not go on from update 6")
    record(
        "uses of an old version's file (resume, fine-tune, evaluate, predict) that worked",
        len(results) + 2,
        failures,
    )
