"""Files of anyone's making: what they hold is never run, and takes neither the time nor the memory."""

import collections
import hashlib
import io
import os
import pickle
import random
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from checkpoint_files import checkpoint, deit_args, refusal, tensors
from safetensors.torch import save as safetensors_of

from runtime import files, pickles, untrusted
from runtime.checkpoints import load, read_label, save
from utils import UserError


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


# ------------------------------------------------------------------------------- small files that ask for much
def text(value):
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def number(value):
    return pickle.dumps(value, 2)[2:-1]


def called(name, *arguments):
    """The instructions of a call."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n(".encode() + b"".join(arguments) + b"tR"


DTYPE = called("numpy.dtype", text("f8"), b"\x89", b"\x88")
STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(2) + b"tQ"
HOOKS = called("collections.OrderedDict")


def tensor(storage=STORAGE, offset=0, size=(2,), stride=(1,)):
    parts = (storage, *map(number, (offset, size, stride, False)), HOOKS)
    return called("torch._utils._rebuild_tensor_v2", *parts)


def claimed(entries):
    return STORAGE.replace(number(2) + b"tQ", number(entries) + b"tQ")


EXHAUSTING = {
    "another codec": (called("_codecs.encode", text("x" * 1000), text("punycode")), "calls _codecs.encode"),
    "many parts": (b"}" * (2**16 + 1), "more than 65,536 parts"),
    "a view of 2**62 entries": (tensor(size=(2**62,), stride=(0,)), "larger than the file"),
    "a view of 2**70 entries": (tensor(size=(2**35, 2**35), stride=(0, 0)), "larger than the file"),
    "a tensor beyond its storage": (tensor(offset=1), "larger than the file"),
    "a tensor of negative size": (tensor(size=(-5,)), "shape (-5,)"),
    "a tensor that runs backwards": (tensor(stride=(-1,)), "strides (-1,)"),
    "a tensor of 1000 axes": (tensor(size=(1,) * 1000, stride=(1,) * 1000), "damaged"),
    "a storage larger than the file": (tensor(claimed(10**12)), "larger than the file"),
    "storages together larger than the file": (
        b"(" + b"".join(tensor(claimed(200).replace(text("0"), text(str(i)))) for i in range(50)) + b"t",
        "larger than the file",
    ),
    "one storage in very many tensors": (
        b"(" + tensor(claimed(20_000), size=(20_000,)) * 1000 + b"t",
        "together much larger than the file",
    ),
    "a copied counter": (
        b"(}q\x00("
        + b"".join(number(i) + b"K\x01" for i in range(10_000))
        + b"u"
        + called("collections.Counter", b"h\x00") * 2000
        + b"t",
        "the same things too often",
    ),
    "a dtype of gigabytes": (called("numpy.dtype", text("V2000000000"), b"\x89", b"\x88"), "calls numpy.dtype"),
    "a dtype that grows": (
        DTYPE + b"(K\x03X\x01\x00\x00\x00<NNN" + number(2**31 - 1) + number(1) + b"K\x00tb",
        "builds a numpy.dtype",
    ),
    "a scalar without a value": (called("numpy.core.multiarray.scalar", DTYPE), "calls numpy.core"),
    "numbers of one hash": (
        b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(1, 1000)) + b"u",
        "not what a checkpoint",
    ),
    "tuples as keys": (b"}()Nu", "not what a checkpoint"),
    "a call of a dtype": (called("torch.float32", text("x")), "calls torch.float32"),
    "a set": (b"\x8f", "uses EMPTY_SET"),
}


@pytest.mark.parametrize("layout", ["zip", "before torch 1.6"])
@pytest.mark.parametrize(("instructions", "reason"), EXHAUSTING.values(), ids=EXHAUSTING)
def test_what_would_take_time_or_memory_is_refused_before_it_is_made(
    tmp_path, monkeypatch, instructions, reason, layout
):
    monkeypatch.setattr(pickles, "MAX_OPCODES", 2**16)
    pickled = b"\x80\x02}" + text("model") + instructions + b"s."
    path = tmp_path / "c.pth"
    if layout == "zip":
        with_pickle(path, pickled)
    else:
        begin = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {}))
        path.write_bytes(begin + pickled + pickle.dumps([], 2))
    assert reason in refusal(path)


def nested(times, value=None):
    for _ in range(times):
        value = [value]
    return value


def doubled(times):
    value = []
    for _ in range(times):
        value = [value, value]
    return value


def endless():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [(nested(300), "nested more than 32"), (doubled(25), "2,097,152 values"), (endless(), "nested more than 32")],
    ids=["nested", "doubled", "endless"],
)
def test_content_through_which_no_walk_ends_is_refused(tmp_path, value, reason):
    torch.save({"model": {"w": torch.ones(1)}, "args": {"x": value}}, tmp_path / "c.pth")
    assert reason in refusal(tmp_path / "c.pth")


def test_content_that_is_shared_as_torch_shares_it_is_no_reason_to_refuse(tmp_path):
    weight, betas = torch.ones(4, 4), (0.9, 0.999)
    groups = [{"betas": betas, "params": [i]} for i in range(1000)]
    state = {"model": {"a": weight, "b": weight, "c": weight[1:]}, "optimizer": {"param_groups": groups}}
    milestones = collections.Counter({30: 1, 60: 1})
    torch.save(state | {"lr_scheduler": {"milestones": milestones}, "acc": np.float32(3)}, tmp_path / "c.pth")
    loaded = load(tmp_path / "c.pth")
    assert loaded["model"]["a"].data_ptr() == loaded["model"]["b"].data_ptr()
    assert loaded["lr_scheduler"]["milestones"] == milestones and loaded["acc"] == 3


def test_an_archive_whose_list_of_entries_fills_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(untrusted, "MAX_DIRECTORY_BYTES", 10_000)
    with_pickle(tmp_path / "c.pth", b"\x80\x02}.", more=[(f"archive/data/{i}", b"") for i in range(300)])
    assert "list of its entries takes" in refusal(tmp_path / "c.pth")
    content = (tmp_path / "c.pth").read_bytes()
    # The same told by the records of archives larger than 4 GiB, as Python and torch read them.
    end = content.rindex(b"PK\x05\x06")
    listed, start = struct.unpack_from("<LL", content, end + 12)
    large = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, 305, 305, listed, start)
    large += b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1)
    small = content[end : end + 12] + struct.pack("<LL", 0, 0) + bytes(2)
    (tmp_path / "c.pth").write_bytes(content[:end] + large + small)
    with zipfile.ZipFile(tmp_path / "c.pth") as archive:
        assert len(archive.namelist()) > 300
    assert "list of its entries takes" in refusal(tmp_path / "c.pth")


def test_a_second_pickle_by_a_name_in_other_letters_is_refused(tmp_path):
    """torch's reader finds entries whatever the case of their names."""
    with_pickle(tmp_path / "c.pth", b"\x80\x02}.", more=[("archive/DATA.PKL", b"\x80\x02]" * 100)])
    assert "not a checkpoint" in refusal(tmp_path / "c.pth")


def test_a_pipe_or_device_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "not a regular file" in refusal(path)
        assert read_label(path) is None
        with pytest.raises(OSError, match="not a regular file"):
            files.read_file(path, 100)


def test_a_path_that_no_file_can_have_is_told():
    with pytest.raises(UserError, match="null byte"):
        load("a\0b.pth")
    assert read_label("a\0b.pth") is None


def test_a_file_larger_than_expected_is_not_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read_file(tmp_path / "file", 5) == b"12345"
    with pytest.raises(OSError, match="more than 4 bytes"):
        files.read_file(tmp_path / "file", 4)


# --------------------------------------------------------------------------------------- fields of other kinds
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("crop_pct", 1e-300, "is 1e-300, not at least 0.01 and at most 1"),
        ("crop_pct", float("nan"), "is nan"),
        ("mean", [True, False, True], "[0] is a bool, not float or int"),
        ("std", [0.5, 0.0], "[1] is 0.0, not above 0"),
        ("meters", {"loss": float("nan")}, "['loss'] is nan"),
        ("class_names", ["a", 5], "[1] is a int, not str"),
        ("class_names", ["x" * 10**6], "[0] has 1,000,000 characters"),
        ("num_classes", 10**12, "is 1000000000000, not"),
        ("input_size", [10**9, 10**9], "[0] is 1000000000, not"),
        ("model_kwargs", {"depths": [10**6]}, "['depths'][0] is 1000000, not"),
        ("model_kwargs", {"depth": float("inf")}, "['depth'] is inf"),
        ("model_kwargs", {1: 2}, "[1] is not a name"),
        ("args", {1: 2}, "[1] is not a name"),
        ("world_size", 2.0, "is a float, not int"),
        ("state_dict_ema", [1], "is a list, not dict"),
    ],
)
def test_a_field_of_another_kind_is_named(tmp_path, field, value, reason):
    torch.save(checkpoint() | {field: value}, tmp_path / "c.pth")
    assert refusal(tmp_path / "c.pth").startswith(
        f"its '{field}'{reason}" if reason[0] == "[" else f"its '{field}' {reason}"
    )


def test_a_field_that_is_none_is_left_out(tmp_path):
    torch.save(checkpoint() | {"class_names": None, "scaler": None, "own": None}, tmp_path / "c.pth")
    assert load(tmp_path / "c.pth").keys() == checkpoint().keys() - {"class_names"} | {"own"}


@pytest.mark.parametrize("label", [f'{{"epoch": {"[" * 450}1{"]" * 450}}}', '{"epoch": "3"}', '{"epoch": -1}'])
def test_a_label_of_another_kind_is_none_of_ours(tmp_path, label):
    save(tmp_path / "c.pth", checkpoint())
    content = (tmp_path / "c.pth").read_bytes()
    end = content.rindex(b"PK\x05\x06")
    comment = b"spectformer %s sha256:%s" % (label.encode(), b"0" * 64)
    (tmp_path / "c.pth").write_bytes(content[: end + 20] + struct.pack("<H", len(comment)) + comment)
    assert read_label(tmp_path / "c.pth") is None
    assert "damaged" in refusal(tmp_path / "c.pth")


def test_metadata_of_another_kind_is_refused(tmp_path):
    marks = {"digest": "spectformer-sha256", "spectformer-sha256": "0" * 64}
    for metadata, reason in [({"num_classes": "-1"}, "'num_classes'"), ({"mean": "[" * 10**5}, "nested")]:
        content = safetensors_of({"w": torch.ones(1)}, marks | metadata)
        digest = hashlib.sha256(content).hexdigest().encode()
        (tmp_path / "c.safetensors").write_bytes(content.replace(b"0" * 64, digest, 1))
        assert reason in refusal(tmp_path / "c.safetensors")
    (tmp_path / "c.safetensors").write_bytes(struct.pack("<Q", 2**31) + b"{" * 1000)
    assert "header of 2,147,483,648 bytes" in refusal(tmp_path / "c.safetensors")
