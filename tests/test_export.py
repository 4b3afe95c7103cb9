"""A checkpoint's model for other programs: `python -m tools.export`."""

import json
import shutil
import sys

import onnx
import onnxruntime
import pytest
import timm
import torch
import untrained
from transformers import AutoModelForImageClassification

from models import load_checkpoint
from models.checkpoints import METADATA_KEYS, read_checkpoint
from models.convert import to_ours
from models.spectral_gate import SpectralGate
from runtime import checkpoints
from tools.export import __main__ as export
from tools.export import graphs, hub
from tools.export.portable import FourierProducts, portable
from utils import MachineError, UserError

ARCHITECTURES = {
    "spectformer_ti": untrained.VANILLA,
    "spectformer_h_s": untrained.PYRAMID,
    "svt_h_s": untrained.PYRAMID | {"mixing": "channel_token"},
}


@pytest.fixture(params=ARCHITECTURES)
def checkpoint(request, tmp_path):
    """A file and its model."""
    path = tmp_path / "c.pth"
    return path, untrained.save(path, request.param, ARCHITECTURES[request.param], input_size=(64, 32))


def images(*size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


def write(path, name, output, *flags):
    export.main([str(path), "--to", name, str(output), *flags])
    return output


# ------------------------------------------------------------------------------------------------------------- weights
def test_safetensors_keep_weights_and_what_prediction_needs(tmp_path, capsys):
    model = untrained.save(tmp_path / "c.pth")
    state = read_checkpoint(tmp_path / "c.pth")
    averaged = {name: value + 1 for name, value in model.state_dict().items()}
    checkpoints.save(tmp_path / "c.pth", state | {"model_ema": averaged})
    for flags, expected in [([], averaged), (["--ema"], averaged), (["--no-ema"], model.state_dict())]:
        written = write(tmp_path / "c.pth", "safetensors", tmp_path / "e.safetensors", "--overwrite", *flags)
        found = read_checkpoint(written)
        assert all(torch.equal(found["model"][name], value) for name, value in expected.items())
        assert {key: found[key] for key in METADATA_KEYS} == {key: _listed(state[key]) for key in METADATA_KEYS}
    assert f"e.safetensors: written, {len(averaged)} tensors" in capsys.readouterr().out


def _listed(value):
    return json.loads(json.dumps(value))


def test_the_authors_names_come_back_the_same(checkpoint, tmp_path, capsys):
    path, model = checkpoint
    written = write(path, "original", tmp_path / "e.pth")
    found = torch.load(written, weights_only=True)["model"]
    trained = model.state_dict()
    assert set(found) != set(trained)
    ours = to_ours(found)
    assert set(ours) == set(trained) and all(torch.equal(ours[name], value) for name, value in trained.items())


def test_what_the_authors_code_has_not_has_none_of_its_names(tmp_path):
    checkpoints.save(tmp_path / "d.pth", {"model": {"a": torch.zeros(1)}, "arch": "deit_tiny_patch16_224"})
    with pytest.raises(UserError, match="d.pth: it holds a deit_tiny"):
        write(tmp_path / "d.pth", "original", tmp_path / "f.pth")


# ----------------------------------------------------------------------------------------------------------------- hub
def test_timm_reads_the_hubs_layout_bit_for_bit_and_transformers_gives_the_same_logits(checkpoint, tmp_path, capsys):
    path, model = checkpoint
    folder = write(path, "hub", tmp_path / "folder")
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    expected = model(images(64, 32))
    assert torch.equal(again(images(64, 32)), expected)
    config = timm.data.resolve_model_data_config(again)
    assert (config["input_size"], config["mean"], config["interpolation"]) == ((3, 64, 32), [0.5] * 3, "bilinear")
    wrapper = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert torch.allclose(wrapper(images(64, 32)).logits, expected, atol=1e-6)
    assert wrapper.config.id2label[7] == "7"


def test_the_card_says_what_the_checkpoint_knows(tmp_path, capsys):
    run = {"args": {"epochs": 12, "lr": 0.001, "data_set": "DIGITS", "mixup": 0.0}, "epoch": 12, "step": 0}
    known = run | {"acc1": 98.765, "averaged": False, "world_size": 8, "version": {"torch": "2.14.1"}}
    untrained.save(tmp_path / "c.pth", "svt_h_s", untrained.PYRAMID, **known)
    card = (write(tmp_path / "c.pth", "hub", tmp_path / "folder") / "README.md").read_text()
    told = [
        "98.77 % top-1",
        "DIGITS",
        "epochs: `12`",
        "processes: `8`",
        "license: mit",
        "embed_dims: `",
        "torch 2.14.1",
    ]
    told += ["title={Scattering Vision Transformer: Spectral Mixing Matters}", f'"local-dir:{tmp_path / "folder"}"']
    assert not [words for words in told if words not in card] and "mixup" not in card


def test_the_accuracy_of_other_weights_than_the_exported_is_not_told(tmp_path):
    more = {"acc1": 98.765, "epoch": 1, "step": 0}
    model = untrained.save(tmp_path / "c.pth")
    state = read_checkpoint(tmp_path / "c.pth") | more | {"averaged": False, "model_ema": model.state_dict()}
    checkpoints.save(tmp_path / "c.pth", state)
    info = load_checkpoint(tmp_path / "c.pth")
    assert hub.told_accuracy(state, info) is None
    assert hub.told_accuracy(state | {"averaged": True}, info).startswith("98.77 %")
    assert hub.told_accuracy(state | {"averaged": True, "step": 3}, info) is None


def test_push_hands_the_same_to_the_hub(tmp_path, monkeypatch, capsys):
    untrained.save(tmp_path / "c.pth")
    pushed = []
    monkeypatch.setattr(hub, "push_to_hf_hub", lambda model, repo, **made: pushed.append((repo, made)))

    def upload(**file):
        pushed.append(file)
        return type("Commit", (), {"repo_url": "https://hub/me/mine"})

    monkeypatch.setattr(hub, "upload_file", upload)
    folder = write(tmp_path / "c.pth", "hub", tmp_path / "folder", "--push", "me/mine")
    (repo, made), config = pushed
    assert repo == "me/mine" and made["model_config"]["label_names"] == list(untrained.DIGITS)
    assert 'hf-hub:me/mine"' in made["model_card"]["usage"]
    assert (config["path_or_fileobj"], config["repo_id"]) == (folder / "config.json", "me/mine")
    assert "uploaded: https://hub/me/mine" in capsys.readouterr().out

    def refuse(*_, **__):
        raise OSError("401: log in")

    monkeypatch.setattr(hub, "push_to_hf_hub", refuse)
    with pytest.raises(UserError, match="--push me/mine: .*401: log in"):
        write(tmp_path / "c.pth", "hub", tmp_path / "folder", "--push", "me/mine", "--overwrite")


# -------------------------------------------------------------------------------------------------------------- graphs
@pytest.mark.parametrize("dynamic", [False, True], ids=["one size", "any size"])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (1, 8), (8, 1), (56, 56)])
def test_real_products_are_the_spectral_gate(size, dynamic):
    torch.manual_seed(0)
    gate = SpectralGate(4, size)
    torch.nn.init.normal_(gate.complex_weight)
    x = torch.randn(2, *size, 4)
    assert torch.allclose(FourierProducts(gate, dynamic)(x), gate(x), atol=2e-5)


def test_real_products_resample_the_filter_for_another_grid():
    gate = SpectralGate(4, (6, 6))
    x = torch.randn(2, 9, 4, 4)
    assert torch.allclose(FourierProducts(gate, dynamic=True)(x), gate(x), atol=1e-6)


def test_the_model_keeps_its_gates():
    model = timm.create_model("spectformer_ti", img_size=32, **untrained.VANILLA)
    other = portable(model, dynamic=False)
    assert isinstance(model.blocks[0].mixer, SpectralGate) and isinstance(other.blocks[0].mixer, FourierProducts)


def test_onnx_gives_torchs_logits_for_any_number_of_images(checkpoint, tmp_path, capsys):
    path, model = checkpoint
    written = write(path, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(written)
    for batch in (1, 5):
        (logits,) = session.run(None, {"images": images(64, 32, batch=batch).numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(images(64, 32, batch=batch)), atol=1e-5)
    graph = onnx.load(written)
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", graphs.OPSET)]
    assert not {node.op_type for node in graph.graph.node} & {"DFT", "STFT"}
    told = {entry.key: json.loads(entry.value) for entry in graph.metadata_props}
    assert told["class_names"] == list(untrained.DIGITS) and told["input_size"] == [64, 32]
    assert "any number of images, 64x32; onnxruntime's logits within" in capsys.readouterr().out


@pytest.mark.parametrize("words", [(), ("--dynamic-size",)], ids=["one size", "any size"])
def test_onnxruntime_finds_gelu_as_one_operation(words, tmp_path):
    untrained.save(tmp_path / "c.pth", "svt_h_s", untrained.PYRAMID, input_size=(64, 32))
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(write(tmp_path / "c.pth", "onnx", tmp_path / "m.onnx", *words), options)
    operations = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert operations & {"Gelu", "BiasGelu"} and "Erf" not in operations


def test_onnx_transposes_no_hidden_grid_around_a_depthwise_convolution(tmp_path):
    untrained.save(tmp_path / "c.pth", "svt_h_s", untrained.PYRAMID, input_size=(64, 32))
    nodes = onnx.load(write(tmp_path / "c.pth", "onnx", tmp_path / "m.onnx")).graph.node
    made_by = {name: node for node in nodes for name in node.output}
    depthwise = [node for node in nodes if any(a.name == "group" and a.i > 1 for a in node.attribute)]
    assert depthwise and {made_by[node.input[0]].op_type for node in depthwise} == {"Conv"}


def test_onnx_multiplies_a_batch_by_one_matrix_not_by_its_copies(tmp_path):
    untrained.save(tmp_path / "c.pth", "svt_h_s", untrained.PYRAMID, input_size=(64, 32))
    graph = onnx.load(write(tmp_path / "c.pth", "onnx", tmp_path / "m.onnx")).graph
    matrices = {matrix.name for matrix in graph.initializer}
    copies = {node.output[0] for node in graph.node if node.op_type == "Expand" and node.input[0] in matrices}
    assert not copies & {name for node in graph.node if node.op_type == "MatMul" for name in node.input}


@pytest.mark.parametrize("arch", ["spectformer_ti", "svt_h_s"])
def test_onnx_of_any_size_resamples_as_torch_does(arch, tmp_path, capsys):
    path = tmp_path / "c.pth"
    untrained.save(
        path, arch, untrained.VANILLA if arch == "spectformer_ti" else untrained.PYRAMID, input_size=(64, 32)
    )
    session = onnxruntime.InferenceSession(write(path, "onnx", tmp_path / "m.onnx", "--dynamic-size"))
    model = load_checkpoint(path, model_kwargs={"dynamic_img_size": True}).model
    for size in ((64, 64), (96, 160), (192, 64)):
        (logits,) = session.run(None, {"images": images(*size).numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(images(*size)), atol=1e-5)


def test_a_graph_that_computes_something_else_is_not_written(tmp_path, monkeypatch):
    untrained.save(tmp_path / "c.pth")
    original = graphs.export
    monkeypatch.setattr(
        graphs, "export", lambda model, *how: original(torch.nn.Sequential(model, torch.nn.Tanh()), *how)
    )
    with pytest.raises(MachineError, match="differ from the model's by .*; nothing was written"):
        write(tmp_path / "c.pth", "pt2", tmp_path / "m.pt2")
    assert not (tmp_path / "m.pt2").exists()


def test_an_exported_program_gives_the_models_logits_for_any_number_of_images(tmp_path, capsys):
    model = untrained.save(tmp_path / "c.pth")
    told = {"model.json": ""}
    program = torch.export.load(write(tmp_path / "c.pth", "pt2", tmp_path / "m.pt2"), extra_files=told).module()
    for batch in (1, 5):
        assert torch.allclose(program(images(32, 32, batch=batch)), model(images(32, 32, batch=batch)), atol=1e-5)
    assert json.loads(json.loads(told["model.json"])["num_classes"]) == 10


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_a_compiled_program_gives_the_models_logits(tmp_path, capsys):
    model = untrained.save(tmp_path / "c.pth")
    written = write(tmp_path / "c.pth", "pt2", tmp_path / "m.pt2", "--compile")
    program = torch._inductor.aoti_load_package(written)
    assert torch.allclose(program(images(32, 32, batch=5)), model(images(32, 32, batch=5)), atol=1e-5)
    assert json.loads(program.get_metadata()["arch"]) == "spectformer_ti"


# ------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "onx", "m.onnx"], "--to onx: choose one of .*; did you mean onnx?"),
        (["--to", "hub", "m", "--dynamic-size"], "--dynamic-size is for --to onnx"),
        (["--to", "onnx", "m.onnx", "--push", "me/mine"], "--push is for --to hub"),
        (["--to", "onnx", "m.pth"], "m.pth: name it .onnx"),
        (["--to", "safetensors", "m.pth"], "m.pth: name it .safetensors"),
        (["--to", "pt2", "there.pt2"], "there.pt2: it is there already; --overwrite replaces it"),
        (["--to", "hub", "full"], "full: it is there already"),
        (["--to", "onnx", "no/m.onnx"], "no/m.onnx: there is no folder no"),
    ],
)
def test_mistakes_are_told_in_one_line_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    untrained.save(tmp_path / "c.pth")
    (tmp_path / "there.pt2").write_bytes(b"kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        export.main(["c.pth", *flags])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    untrained.save(tmp_path / "c.pth")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match="--to onnx needs pip install onnx onnxruntime onnxscript"):
        write(tmp_path / "c.pth", "onnx", tmp_path / "m.onnx")


def test_a_model_of_timms_is_exported_too(tmp_path, capsys):
    kwargs = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    model = untrained.save(tmp_path / "c.pth", "deit_tiny_patch16_224", kwargs)
    session = onnxruntime.InferenceSession(write(tmp_path / "c.pth", "onnx", tmp_path / "m.onnx"))
    (logits,) = session.run(None, {"images": images(32, 32).numpy()})
    assert torch.allclose(torch.from_numpy(logits), model(images(32, 32)), atol=1e-5)
    with pytest.raises(UserError, match="dynamic"):
        write(tmp_path / "c.pth", "onnx", tmp_path / "n.onnx", "--dynamic-size")
