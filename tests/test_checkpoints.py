"""Checkpoints: what is saved comes back, damage is noticed, foreign and old files load, none executes code."""

import argparse
import os
import pathlib
import pickle
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from models.checkpoints import CheckpointError, check_model_kwargs, peek, read_checkpoint, weights_of
from runtime.checkpoints import newest_intact, save, save_safetensors
from utils import UserError


def tensors():
    torch.manual_seed(0)
    return {
        "head.weight": torch.randn(10, 16),
        "head.bias": torch.zeros(10),
        "norm.steps": torch.tensor(3),
        "half": torch.randn(5, dtype=torch.bfloat16),
        "gate": torch.randn(3, 2, dtype=torch.complex64),
    }


def checkpoint(epoch=3, step=0):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return {
        "model": tensors(),
        "model_ema": {k: v + 1 for k, v in tensors().items()},
        "optimizer": optimizer.state_dict(),
        "epoch": epoch,
        "step": step,
        "meters": {"loss": 2.5},
        "arch": "spectformer_xs",
        "model_kwargs": {"depth": 4},
        "mean": [0.5],
        "class_names": ["a", "b"],
        "args": {"lr": 1e-3, "output": None},
    }


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def refusal(path):
    """The reason for which a file is refused, in one line that begins with its path."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < len(str(path)) + 300
    return message.removeprefix(f"{path}: ")


# ------------------------------------------------------------------------------------------------ round trip
def test_a_checkpoint_comes_back_and_plain_torch_reads_it(tmp_path):
    state = checkpoint()
    save(tmp_path / "c.pth", state)
    assert same(read_checkpoint(tmp_path / "c.pth"), state) and same(peek(tmp_path / "c.pth"), state)
    assert same(torch.load(tmp_path / "c.pth", weights_only=True), state)
    assert os.listdir(tmp_path) == ["c.pth"]


def test_safetensors_keep_the_weights_and_what_prediction_needs(tmp_path):
    shared = tensors() | {"tied.weight": tensors()["head.weight"][:5].T}
    save_safetensors(tmp_path / "c.safetensors", shared, checkpoint())
    read = read_checkpoint(tmp_path / "c.safetensors")
    kept = {key: checkpoint()[key] for key in ("arch", "model_kwargs", "mean", "class_names")}
    assert same(read, {"model": shared} | kept)


# ------------------------------------------------------------------------------------- other people's files
def deit_args():
    return argparse.Namespace(model="svt_s", lr=5e-4, output_dir=pathlib.PosixPath("out"), amp=True)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda sd: OrderedDict(sd),
        lambda sd: {"model": sd, "optimizer": {}, "lr_scheduler": {"k": 1}, "epoch": 3, "args": deit_args()},
        lambda sd: {"model": {"state_dict": sd}},
        lambda sd: {"state_dict": {f"module.{k}": v for k, v in sd.items()}, "metric": np.float64(0.8)},
        lambda sd: {"model_state_dict": {f"_orig_mod.{k}": v for k, v in sd.items()}, "max": np.int64(3)},
        lambda sd: {"net": {f"model.{k}": v for k, v in sd.items()}, "version": torch.__version__},
        lambda sd: {"state_dict": {f"model.{k}": v for k, v in sd.items()} | {"criterion.weight": torch.ones(3)}},
        lambda sd: {"state_dict": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in sd.items()}},
    ],
)
def test_the_layouts_of_others_load(tmp_path, layout, zipped):
    torch.save(layout(tensors()), tmp_path / "old.pth", _use_new_zipfile_serialization=zipped)
    state = read_checkpoint(tmp_path / "old.pth")
    assert same({name: value.data for name, value in weights_of(state).items()}, tensors())
    assert isinstance(state.get("args", {}), dict)


def test_averaged_weights_are_chosen_on_request():
    for key in ("model_ema", "state_dict_ema"):
        state = {"model": {"w": torch.zeros(1)}, key: {"w": torch.ones(1)}}
        assert [weights_of(state, ema)["w"].item() for ema in (None, True, False)] == [1, 1, 0]
    with pytest.raises(CheckpointError, match="^c.pth: it has no averaged"):
        weights_of({"model": {"w": torch.zeros(1)}}, True, "c.pth")


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, {"model": {}}, {"model": [torch.ones(1)]}, {"model": {"w": 3}}])
def test_a_file_without_weights_is_refused_by_name(content):
    with pytest.raises(CheckpointError, match="^c.pth: it has no model weights"):
        weights_of(content, path="c.pth")


def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path):
    for name, content in {
        "empty": b"",
        "text": b"hello world\n" * 100,
        "jpeg": b"\xff\xd8\xff\xe0" + bytes(1000),
        "zip": b"PK\x05\x06" + bytes(18),
        "noise": random.Random(0).randbytes(5000),
        "half a pickle": pickle.dumps({"a": "b" * 1000})[:500],
        "weights.safetensors": b"\xff" * 100,
    }.items():
        (tmp_path / name).write_bytes(content)
        assert "not a checkpoint" in refusal(tmp_path / name), name
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    assert "it contains a Tensor" in refusal(tmp_path / "tensor.pth")
    assert refusal(tmp_path / "missing.pth") == "no such file"
    os.mkfifo(tmp_path / "pipe")
    assert refusal(tmp_path) == refusal(tmp_path / "pipe") == "not a regular file"


class Executing:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_executes_no_code(tmp_path, zipped):
    marker = tmp_path / "executed"
    for call in ((os.system, f"touch {marker}"), (eval, f"open({str(marker)!r}, 'w')"), (marker.touch,)):
        state = {"model": tensors(), "args": Executing(*call)}
        torch.save(state, tmp_path / "c.pth", _use_new_zipfile_serialization=zipped)
        refusal(tmp_path / "c.pth")
        (tmp_path / "c.pth").write_bytes(pickle.dumps(state))
        refusal(tmp_path / "c.pth")
    assert not marker.exists()


def test_arguments_that_make_timm_open_a_url_or_a_file_are_refused():
    check_model_kwargs({"depth": 4, "drop_path_rate": 0.1}, "c.pth")
    for argument in ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"):
        with pytest.raises(CheckpointError, match=f"^c.pth: {argument} would make timm read"):
            check_model_kwargs({argument: "https://example.org/x"}, "c.pth")


# --------------------------------------------------------------------------------------- which to resume from
def test_the_newest_intact_checkpoint_is_found_and_the_damaged_are_named(tmp_path, capsys):
    assert newest_intact(tmp_path) == (None, None)
    save(tmp_path / "checkpoint_0001.pth", checkpoint(1))
    save(tmp_path / "checkpoint_best.pth", checkpoint(2))
    save(tmp_path / "checkpoint_last.pth", checkpoint(2, 50))
    torch.save({"model": tensors()}, tmp_path / "checkpoint_weights.pth")
    path, state = newest_intact(tmp_path)
    assert path.name == "checkpoint_last.pth" and same(state, checkpoint(2, 50))
    assert "checkpoint_weights.pth: it contains no epoch" in capsys.readouterr().err
    for name, expected in [("last", "best"), ("best", "0001")]:
        path = tmp_path / f"checkpoint_{name}.pth"
        data = bytearray(path.read_bytes())
        data[data.index(tensors()["head.weight"].numpy().tobytes())] ^= 1
        path.write_bytes(data)
        assert newest_intact(tmp_path)[0].name == f"checkpoint_{expected}.pth"
        assert f"passing over {path}: damaged" in capsys.readouterr().err
    (tmp_path / "checkpoint_0001.pth").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{tmp_path}: none of its 4 checkpoints is intact"):
        newest_intact(tmp_path)
