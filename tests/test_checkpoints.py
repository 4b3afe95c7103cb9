"""Checkpoints: what is saved comes back, damage is noticed, old files load."""

import argparse
import itertools
import os
import pathlib
import pickle
import random
import resource
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from checkpoint_files import checkpoint, deit_args, refusal, same, tensors
from torch import nn

from runtime.checkpoints import load, read_label, save, weights
from runtime.lineage import newest_valid
from runtime.tensor_files import save_tensors
from utils import MachineError, UserError


# ------------------------------------------------------------------------------------------------ round trip
def test_a_checkpoint_comes_back_and_plain_torch_reads_it(tmp_path):
    state = checkpoint()
    save(tmp_path / "c.pth", state)
    assert same(load(tmp_path / "c.pth"), state)
    for mmap in (False, True):
        assert same(torch.load(tmp_path / "c.pth", weights_only=True, mmap=mmap), state)
    assert os.listdir(tmp_path) == ["c.pth"]


def test_the_label_is_read_without_the_file(tmp_path):
    save(tmp_path / "c.pth", checkpoint(7, 40), {"acc1": 71.5})
    assert read_label(tmp_path / "c.pth") == {"epoch": 7, "step": 40, "acc1": 71.5}
    torch.save(checkpoint(), tmp_path / "plain.pth")
    assert read_label(tmp_path / "plain.pth") is None and read_label(tmp_path / "none.pth") is None


def test_what_could_not_be_loaded_is_made_plain_or_not_saved(tmp_path):
    state = {
        "model": tensors(),
        "args": argparse.Namespace(path=pathlib.Path("a/b"), lr=np.float64(0.5)),
        "version": torch.__version__,
        "best_acc1": np.float32(2),
        "weights": OrderedDict(a=1),
    }
    save(tmp_path / "c.pth", state)
    loaded = load(tmp_path / "c.pth")
    assert loaded["args"] == {"path": "a/b", "lr": 0.5} and type(loaded["version"]) is str
    with pytest.raises(TypeError, match=r"state\['model'\]\['f'\] is a Linear"):
        save(tmp_path / "c.pth", {"model": {"f": nn.Linear(1, 1)}})
    assert same(load(tmp_path / "c.pth"), loaded)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "c.pth"
    save(path, checkpoint(1))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    offsets = [0, 1, 21, 22, 63, 64, *np.linspace(100, len(before) - 1, 34).astype(int).tolist()]
    assert len(offsets) == 40
    try:
        for offset in offsets:
            resource.setrlimit(resource.RLIMIT_FSIZE, (offset, hard))  # refuses like a full disk
            with pytest.raises(MachineError, match=f"^{path}: cannot be written: File too large$"):
                save(path, checkpoint(2))
            assert path.read_bytes() == before and os.listdir(tmp_path) == ["c.pth"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_reader_beside_a_writer_gets_whole_checkpoints(tmp_path):
    save(tmp_path / "c.pth", checkpoint(0))
    done, epochs = threading.Event(), []

    def read():
        while not done.is_set():
            epochs.append(load(tmp_path / "c.pth")["epoch"])

    reader = threading.Thread(target=read)
    reader.start()
    for epoch in range(30):
        save(tmp_path / "c.pth", checkpoint(epoch))
    done.set()
    reader.join()
    assert epochs and epochs == sorted(epochs)


# ---------------------------------------------------------------------------------------------------- damage
def flips(data, generator, count):
    for _ in range(count):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        yield bytes(damaged)


def truncations(data, generator, count):
    ends = [0, 1, 2, 21, 22, len(data) - 1, len(data) - 64, len(data) - 22]
    for end in itertools.chain(ends, (generator.randrange(len(data)) for _ in range(count))):
        yield data[:end]


def zeroed_runs(data, generator, count):
    while count:
        start, length = generator.randrange(len(data)), generator.choice([1, 7, 64, 512, 4096])
        damaged = data[:start] + bytes(len(data[start : start + length])) + data[start + length :]
        if damaged != data:
            count -= 1
            yield damaged


@pytest.mark.parametrize(("damage", "count"), [(flips, 200), (truncations, 60), (zeroed_runs, 60)])
def test_every_damage_is_noticed(tmp_path, damage, count):
    save(tmp_path / "c.pth", checkpoint())
    path = tmp_path / "damaged.pth"
    data = (tmp_path / "c.pth").read_bytes()
    # And each byte of the end, which holds the digest itself.
    ends = [data[:-i] + bytes([data[-i] ^ 4]) + data[len(data) - i + 1 :] for i in range(1, 150)]
    for damaged in itertools.chain(damage(data, random.Random(0), count), ends if damage is flips else []):
        path.write_bytes(damaged)
        refusal(path)


def test_damage_of_a_file_without_digest_is_noticed_by_its_checksums(tmp_path):
    torch.save({"model": {"w": torch.randn(1000)}}, tmp_path / "plain.pth")
    data = bytearray((tmp_path / "plain.pth").read_bytes())
    data[2000] ^= 1
    (tmp_path / "plain.pth").write_bytes(data)
    assert "checksum" in refusal(tmp_path / "plain.pth")


def test_exported_tensors_notice_damage(tmp_path):
    save_tensors(tmp_path / "c.safetensors", tensors(), checkpoint())
    data = (tmp_path / "c.safetensors").read_bytes()
    header = (data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(data.index(b"}}") + 50))
    damages = [damage(data, random.Random(0), 30) for damage in (flips, truncations, zeroed_runs)]
    for damaged in itertools.chain(header, *damages):
        (tmp_path / "d.safetensors").write_bytes(damaged)
        refusal(tmp_path / "d.safetensors")


# ------------------------------------------------------------------------------------------------- old files
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize(
    "layout",
    [
        lambda sd: sd,
        lambda sd: OrderedDict(sd),
        lambda sd: {"model": sd, "optimizer": {}, "lr_scheduler": {"k": 1}, "epoch": 3, "args": deit_args()},
        lambda sd: {"model": {"state_dict": sd}},
        lambda sd: {"state_dict": sd, "arch": "svt_s", "metric": np.float64(0.8), "version": 2},
        lambda sd: {"model": OrderedDict(sd), "version": torch.__version__, "max": np.int64(3)},
        lambda sd: {"state_dict": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in sd.items()}},
    ],
)
def test_the_layouts_of_the_authors_load(tmp_path, layout, zipped):
    torch.save(layout(tensors()), tmp_path / "old.pth", _use_new_zipfile_serialization=zipped)
    state = load(tmp_path / "old.pth")
    assert weights(state).keys() == tensors().keys()
    assert all(torch.equal(value, tensors()[name]) for name, value in weights(state).items())
    assert isinstance(state.get("args", {}), dict)


def test_averaged_weights_are_chosen_on_request():
    for key in ("model_ema", "state_dict_ema"):
        state = {"model": {"w": torch.zeros(1)}, key: {"w": torch.ones(1)}}
        assert [weights(state, ema)["w"].item() for ema in (None, True, False)] == [1, 1, 0]
    with pytest.raises(UserError, match="^c.pth: it has no averaged"):
        weights({"model": {"w": torch.zeros(1)}}, True, "c.pth")


def test_a_non_finite_weight_is_no_reason_to_refuse(tmp_path):
    save(tmp_path / "c.pth", {"model": {"w": torch.tensor([float("nan")])}})
    assert load(tmp_path / "c.pth")["model"]["w"].isnan()


# ------------------------------------------------------------------------------------------ unusable content
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([1, 2], "holds a list"),
        (torch.ones(3), "holds a Tensor"),
        ({}, "no model weights"),
        ({"epoch": 3}, "no model weights"),
        ({"model": {}}, "no model weights"),
        ({"model": None}, "no model weights"),
        ({"model": [torch.ones(1)]}, "no model weights"),
        ({"model": {"w": 3}}, "no model weights"),
        ({"model": {3: torch.ones(1)}}, "no model weights"),
        ({3: torch.ones(1)}, "key '3'"),
        ({"model": {"w": torch.ones(1)}, "epoch": "3"}, "'epoch' is a str, not int"),
        ({"model": {"w": torch.ones(1)}, "epoch": True}, "'epoch' is a bool"),
        ({"model": {"w": torch.ones(1)}, "step": -1}, "'step' is -1"),
        ({"model": {"w": torch.ones(1)}, "optimizer": []}, "'optimizer' is a list"),
        ({"model": {"w": torch.ones(1)}, "args": 1}, "'args' is a int"),
        ({"model": {"w": torch.ones(1)}, "best_acc1": "high"}, "'best_acc1' is a str"),
        ({"model": {"w": torch.ones(1)}, "class_names": "abc"}, "'class_names' is a str"),
        ({"model": {"w": torch.ones(1).expand(10**9)}}, "larger than the file"),
    ],
)
def test_wrong_content_is_named(tmp_path, content, reason):
    torch.save(content, tmp_path / "c.pth")
    assert reason in refusal(tmp_path / "c.pth")


def test_what_is_no_checkpoint_is_named(tmp_path):
    for name, content, reason in [
        ("empty", b"", "empty"),
        ("text", b"hello world\n" * 100, "not a checkpoint"),
        ("jpeg", b"\xff\xd8\xff\xe0" + bytes(1000), "not a checkpoint"),
        ("zip", b"PK\x05\x06" + bytes(18), "not a checkpoint"),
        ("tar", bytes(257) + b"ustar" + bytes(1000), "tar format"),
        ("noise", random.Random(0).randbytes(5000), "not a checkpoint"),
        ("half a pickle", pickle.dumps({"a": "b" * 1000})[:500], "not a checkpoint"),
        ("weights.safetensors", b"\xff" * 100, "not a safetensors file"),
    ]:
        (tmp_path / name).write_bytes(content)
        assert reason in refusal(tmp_path / name), name
    assert "No such file" in refusal(tmp_path / "missing.pth")
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


# --------------------------------------------------------------------------------------- which to go on from
def test_the_furthest_intact_checkpoint_is_taken_and_the_damaged_are_named(tmp_path, capsys):
    assert newest_valid(tmp_path) is None
    save(tmp_path / "checkpoint_0001.pth", checkpoint(1))
    save(tmp_path / "checkpoint_best.pth", checkpoint(2))
    save(tmp_path / "checkpoint_last.pth", checkpoint(2, 50))
    os.utime(tmp_path / "checkpoint_0001.pth")
    assert newest_valid(tmp_path)[0].name == "checkpoint_last.pth" and capsys.readouterr().err == ""
    for name, expected in [("last", "best"), ("best", "0001")]:
        path = tmp_path / f"checkpoint_{name}.pth"
        data = bytearray(path.read_bytes())
        data[1000] ^= 1
        path.write_bytes(data)
        found, state = newest_valid(tmp_path)
        assert found.name == f"checkpoint_{expected}.pth"
        assert state["epoch"] == (2 if expected == "best" else 1)
        assert f"passing over {path}: it is damaged" in capsys.readouterr().err
    (tmp_path / "checkpoint_0001.pth").write_bytes(b"")
    with pytest.raises(UserError, match=f"^{tmp_path}: none of its 3 checkpoints"):
        newest_valid(tmp_path)


def test_truncated_and_foreign_checkpoints_take_part(tmp_path, capsys):
    save(tmp_path / "checkpoint_0001.pth", checkpoint(1))
    torch.save(checkpoint(4), tmp_path / "checkpoint_old.pth")  # as written before there were digests
    save(tmp_path / "checkpoint_last.pth", checkpoint(5))
    data = (tmp_path / "checkpoint_last.pth").read_bytes()
    (tmp_path / "checkpoint_last.pth").write_bytes(data[:-100])
    torch.save({"model": tensors()}, tmp_path / "checkpoint_weights.pth")
    assert newest_valid(tmp_path)[0].name == "checkpoint_old.pth"
    told = capsys.readouterr().err
    assert "checkpoint_last.pth: it is damaged" in told and "checkpoint_weights.pth: it does not say" in told


def test_of_equals_the_one_written_last_is_taken(tmp_path):
    for i, name in enumerate(("checkpoint_last.pth", "checkpoint_best.pth")):
        save(tmp_path / name, checkpoint(2))
        os.utime(tmp_path / name, (1000 + i, 1000 + i))
    assert newest_valid(tmp_path)[0].name == "checkpoint_best.pth"
