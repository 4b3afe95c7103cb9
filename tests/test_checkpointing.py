"""Checkpoints: what is saved comes back, damage is noticed, old files load, hostile ones run nothing."""

import argparse
import io
import itertools
import os
import pathlib
import pickle
import random
import resource
import struct
import threading
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

import checkpointing
from checkpointing import load, newest_valid, read_label, save, save_tensors, weights
from tools import export_checkpoint
from utils import MachineError, UserError


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
        "best_acc1": 71.5,
        "best_epoch": 2,
        "arch": "spectformer_xs",
        "model_kwargs": {"depth": 4},
        "num_classes": 10,
        "input_size": [32, 32],
        "mean": [0.5],
        "std": [0.5],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "class_names": ["a", "b"],
        "args": {"lr": 1e-3, "output": None},
        "version": {"torch": str(torch.__version__)},
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
    """The message with which `path` is refused: one line that names it and gives a reason."""
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert len(message) < len(str(path)) + 300
    assert "Re-running" not in message and "Please use" not in message
    return message.removeprefix(f"{path}: ")


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
def deit_args():
    return argparse.Namespace(model="svt_s", lr=5e-4, output_dir=pathlib.PosixPath("out"), amp=True)


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
    assert "not a file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a file" in refusal(tmp_path / "pipe")


# ------------------------------------------------------------------------------------------- hostile content
class Call:
    """Pickles as the call of a global by its name, so that the pickle can be written without the call."""

    def __init__(self, name, *args):
        self.name, self.args = name, args

    def pickled(self):
        """A protocol 2 pickle of {"model": name(*args)}."""
        module, name = self.name.rsplit(".", 1)
        arguments = pickle.dumps(self.args, 2)[2:-1]
        return b"\x80\x02}X\x05\x00\x00\x00model" + f"c{module}\n{name}\n".encode() + arguments + b"Rs."


CALLS = [
    Call("os.system", "touch {proof}"),
    Call("posix.system", "touch {proof}"),
    Call("nt.system", "touch it"),
    Call("subprocess.Popen", ["touch", "{proof}"]),
    Call("subprocess.check_output", ["touch", "{proof}"]),
    Call("builtins.eval", "open('{proof}', 'w')"),
    Call("builtins.exec", "open('{proof}', 'w')"),
    Call("__builtin__.eval", "open('{proof}', 'w')"),
    Call("builtins.open", "{proof}", "w"),
    Call("builtins.compile", "1", "x", "exec"),
    Call("builtins.getattr", 1, "real"),
    Call("builtins.__import__", "os"),
    Call("importlib.import_module", "this"),
    Call("runpy.run_path", "x"),
    Call("pickle.loads", b"cos\nsystem\n."),
    Call("_pickle.loads", b"."),
    Call("torch.load", "x.pth"),
    Call("torch.hub.load", "x", "y"),
    Call("torch.serialization.add_safe_globals", ["os.system"]),
    Call("torch.ops.load_library", "x.so"),
    Call("ctypes.CDLL", "x.so"),
    Call("shutil.rmtree", "{proof}"),
    Call("os.remove", "{proof}"),
    Call("socket.create_connection", ("127.0.0.1", 1)),
    Call("pty.spawn", "sh"),
    Call("codecs.open", "{proof}", "w"),
    Call("io.open", "{proof}", "w"),
    Call("pathlib.Path.touch", "x"),
    Call("operator.attrgetter", "system"),
    Call("functools.partial", print),
    Call("timeit.timeit", "1"),
    Call("webbrowser.open", "x"),
    Call("numpy.load", "{proof}"),
    Call("numpy.testing.runstring", "1", {}),
    Call("builtins.bytearray", 10**13),
    Call("torch.Tensor", 10**13),
    Call("builtins.print", "x"),
    Call("torch._utils._rebuild_wrapper_subclass", 1),
    Call("logging.config.listen", 9999),
    Call("torch.distributed.rpc.rpc_sync", "x"),
    Call("sys.exit", 0),
    Call("os._exit", 0),
]


def with_pickle(path, pickled, more=(), compression=zipfile.ZIP_STORED, content=None):
    """A checkpoint at `path`, of `content` but for its data.pkl, which is `pickled`."""
    plain = io.BytesIO()
    torch.save(content or {"model": {"w": torch.ones(2)}}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", compression) as target:
        for entry in source.infolist():
            data = pickled if entry.filename.endswith("/data.pkl") else source.read(entry)
            target.writestr(entry.filename, data, compression)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # duplicate names, on purpose
            for name, data in more:
                target.writestr(name, data, compression)


@pytest.mark.parametrize("call", CALLS, ids=[call.name for call in CALLS])
def test_a_malicious_pickle_runs_nothing(tmp_path, call):
    proof = tmp_path / "proof"
    call = Call(call.name, *[a.format(proof=proof) if isinstance(a, str) else a for a in call.args])
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + call.pickled()
    with_pickle(tmp_path / "zip.pth", call.pickled())
    (tmp_path / "legacy.pth").write_bytes(legacy + pickle.dumps([], 2))
    (tmp_path / "bare.pth").write_bytes(call.pickled())
    with_pickle(tmp_path / "stack.pth", b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.")
    for name in ("zip", "legacy", "bare", "stack"):
        assert "nothing was run" in refusal(tmp_path / f"{name}.pth")
    assert not proof.exists()


def test_safe_globals_do_not_outlast_the_load(tmp_path):
    torch.save({"model": tensors(), "args": deit_args()}, tmp_path / "c.pth")
    load(tmp_path / "c.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth", weights_only=True)


def test_bombs_and_strange_archives_are_refused_before_they_are_unpacked(tmp_path):
    torch.save({"model": {"w": torch.ones(2)}}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as archive:
        good = archive.read("plain/data.pkl")
    path = tmp_path / "bomb.pth"

    def attempt(reason, *args, **more):
        with_pickle(path, *args, **more)
        assert reason in refusal(path)

    attempt("is compressed", good, compression=zipfile.ZIP_DEFLATED)
    bomb = ("archive/data/9", bytes(50 * 2**20))
    attempt("is compressed", good, more=[bomb], compression=zipfile.ZIP_DEFLATED)
    attempt("structure takes", b"(" * (2**24 + 1))
    attempt("not a checkpoint", good, more=[("/etc/passwd", b"x")])
    attempt("leave the archive", good, more=[("archive/../../x", b"x")])
    attempt("leave the archive", good, more=[("archive/..\\x", b"x")])
    attempt("not a checkpoint", good, more=[("other/data.pkl", b"x")])
    attempt("not a checkpoint", good, more=[("archive/data.pkl", good)])
    # One that declares a storage of 2 TB and a tensor of 10^12 elements.
    attempt("may be damaged", good.replace(b"K\x02tq", b"\x8a\x06\x00\x00\x00\x00\x00\x02tq", 1))
    # A central directory that claims 4 GB for an entry.
    data = bytearray((tmp_path / "plain.pth").read_bytes())
    entry = data.index(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    path.write_bytes(data)
    assert "larger than the file" in refusal(path)


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path):
    with open(tmp_path / "huge.pth", "wb") as file:
        file.truncate(2**40)
    assert "GiB" in refusal(tmp_path / "huge.pth")


def test_mutated_checkpoints_are_refused_or_load_in_one_line(tmp_path):
    """Without our digest: random bytes of the pickle changed, checksums made right again."""
    torch.save(checkpoint(), tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as archive:
        good = archive.read("plain/data.pkl")
    generator, loaded = random.Random(0), 0
    for _ in range(150):
        mutated = bytearray(good)
        for _ in range(generator.choice([1, 1, 3, 10])):
            mutated[generator.randrange(len(good))] = generator.randrange(256)
        with_pickle(tmp_path / "mutated.pth", bytes(mutated), content=checkpoint())
        try:
            load(tmp_path / "mutated.pth")
            loaded += 1
        except UserError as error:
            assert "\n" not in str(error) and str(tmp_path / "mutated.pth") in str(error)
    assert 0 < loaded < 150


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


# ---------------------------------------------------------------------------------------------------- export
def test_export_to_safetensors_keeps_weights_and_what_prediction_needs(tmp_path, capsys):
    save(tmp_path / "c.pth", checkpoint())
    exported = tmp_path / "e.safetensors"
    for flags, plus in [([], 1), (["--ema"], 1), (["--no-ema"], 0)]:
        export_checkpoint.main([str(tmp_path / "c.pth"), str(exported), "--overwrite", *flags])
        state = load(exported)
        assert same(state["model"], {name: value + plus for name, value in tensors().items()})
        assert {key: state[key] for key in checkpointing.METADATA_KEYS} == {
            key: checkpoint()[key] for key in checkpointing.METADATA_KEYS
        }
    with pytest.raises(UserError, match="e.safetensors: it is there already"):
        export_checkpoint.main([str(tmp_path / "c.pth"), str(exported)])
    with pytest.raises(UserError, match="e.onnx: name it"):
        export_checkpoint.main([str(tmp_path / "c.pth"), str(tmp_path / "e.onnx")])


def test_export_to_the_authors_names_comes_back_the_same(tmp_path, capsys):
    import timm

    import models
    from models.checkpoints import to_ours

    assert models.resolve_arch("svt-h-s") == "svt_h_s"
    trained = timm.create_model("svt_h_s", num_classes=3, img_size=32, token_label=True).state_dict()
    save(tmp_path / "c.pth", {"model": trained, "arch": "svt_h_s"})
    export_checkpoint.main([str(tmp_path / "c.pth"), str(tmp_path / "e.pth"), "--original"])
    exported = torch.load(tmp_path / "e.pth", weights_only=True)["model"]
    assert "patch_embed2.proj.weight" in exported and "stages.1.downsample.proj.weight" not in exported
    assert same(dict(sorted(to_ours(exported).items())), dict(sorted(trained.items())))
    save(tmp_path / "d.pth", {"model": tensors(), "arch": "deit_tiny_patch16_224"})
    with pytest.raises(UserError, match="d.pth: it holds a deit_tiny"):
        export_checkpoint.main([str(tmp_path / "d.pth"), str(tmp_path / "f.pth"), "--original"])
