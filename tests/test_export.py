"""Export a checkpoint's model for other programs: `python -m tools.export`."""

import json

import onnx
import onnxruntime
import pytest
import timm
import torch
import untrained
from transformers import AutoModelForImageClassification

from models import load_checkpoint
from models.checkpoints import METADATA_KEYS, CheckpointError, read_checkpoint
from models.convert import to_ours
from models.pretrained import ModelError
from runtime import checkpoints
from tools import export
from utils import MachineError, UserError

ARCHITECTURES = {
    "spectformer_ti": untrained.VANILLA,
    "spectformer_h_s": untrained.PYRAMID,
    "svt_h_s": untrained.PYRAMID | {"mixing": "channel_token"},
}


@pytest.fixture(params=ARCHITECTURES)
def checkpoint(request, tmp_path):
    """Save a checkpoint; return its path and model."""
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
        metadata = {key: state[key] for key in METADATA_KEYS}
        assert {key: found[key] for key in METADATA_KEYS} == json.loads(json.dumps(metadata))
    assert f"e.safetensors: written, {len(averaged)} tensors" in capsys.readouterr().out


def test_half_precision_halves_the_file(tmp_path):
    model = untrained.save(tmp_path / "c.pth")
    full = write(tmp_path / "c.pth", "safetensors", tmp_path / "f.safetensors").stat().st_size
    half = write(tmp_path / "c.pth", "safetensors", tmp_path / "h.safetensors", "--half")
    assert half.stat().st_size < 0.6 * full
    found = read_checkpoint(half)["model"]
    assert all(torch.equal(found[name], value.half()) for name, value in model.state_dict().items())


def test_the_authors_names_come_back_the_same(checkpoint, tmp_path):
    path, model = checkpoint
    found = torch.load(write(path, "original", tmp_path / "e.pth"), weights_only=True)["model"]
    trained = model.state_dict()
    assert set(found) != set(trained)
    ours = to_ours(found)
    assert set(ours) == set(trained) and all(torch.equal(ours[name], value) for name, value in trained.items())


def test_arch_names_the_model_of_a_file_that_does_not(tmp_path):
    untrained.save(tmp_path / "c.pth", instead={"arch": None})
    written = write(tmp_path / "c.pth", "safetensors", tmp_path / "e.safetensors", "--arch", "spectformer_ti")
    assert read_checkpoint(written)["arch"] == "spectformer_ti"
    write(tmp_path / "c.pth", "original", tmp_path / "o.pth", "--arch", "SpectFormer-Ti")
    for name, path in [("safetensors", "t.safetensors"), ("original", "t.pth")]:
        with pytest.raises(ModelError, match="spectformer_tii: no such model; did you mean spectformer_ti?"):
            write(tmp_path / "c.pth", name, tmp_path / path, "--arch", "spectformer_tii")
        assert not (tmp_path / path).exists()
    untrained.save(tmp_path / "d.pth")
    with pytest.raises(CheckpointError, match="it contains spectformer_ti, not svt_h_s"):
        write(tmp_path / "d.pth", "safetensors", tmp_path / "f.safetensors", "--arch", "svt_h_s")
    folder = write(tmp_path / "c.pth", "hub", tmp_path / "folder", "--arch", "spectformer_ti")
    assert json.loads((folder / "config.json").read_text())["architecture"] == "spectformer_ti"


# ----------------------------------------------------------------------------------------------------------------- hub
@pytest.mark.slow
def test_timm_reads_the_hubs_layout_bit_for_bit_and_transformers_gives_the_same_logits(checkpoint, tmp_path):
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


def test_card_and_config_say_what_is_known_of_the_run_and_nothing_else(tmp_path):
    args = {"data_set": "IMNET", "data_path": "/data/birds", "output_dir": "/secret/place"}
    kwargs = {"depths": (1, 1, 1, 1)}
    untrained.save(tmp_path / "c.pth", "spectformer_h_n", kwargs, classes=("wren", "crow"), args=args)
    folder = write(tmp_path / "c.pth", "hub", tmp_path / "folder")
    card, config = (folder / "README.md").read_text(), (folder / "config.json").read_text()
    assert f'"local-dir:{tmp_path / "folder"}"' in card and "license: unknown" in card
    assert "arxiv.org/abs/2304.06446" in card
    assert "spectformer_h_n, " in card and "birds" in card
    assert not [words for words in ("secret", "airplane", "timm/", "/weights") if words in card]
    assert not [words for words in ("cifar", "airplane", "paper", "license") if words in config]
    assert json.loads(config)["label_names"] == ["wren", "crow"]


# -------------------------------------------------------------------------------------------------------------- graphs
@pytest.mark.slow
def test_onnx_gives_torchs_logits_for_any_number_of_images(checkpoint, tmp_path, capsys):
    path, model = checkpoint
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    written = write(path, "onnx", tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(written, options)
    for batch in (1, 5):
        (logits,) = session.run(None, {"images": images(64, 32, batch=batch).numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(images(64, 32, batch=batch)), atol=1e-5)
    proto = onnx.load(written)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", export.OPSET)]
    assert not {node.op_type for node in proto.graph.node} & {"DFT", "STFT"}
    metadata = {entry.key: json.loads(entry.value) for entry in proto.metadata_props}
    assert metadata["class_names"] == list(untrained.DIGITS) and metadata["input_size"] == [64, 32]
    assert "any batch size; its logits in onnxruntime differ by at most" in capsys.readouterr().out
    # For speed, GELU is a single operator, and the feed-forward networks' depthwise convolutions follow convolutions.
    operations = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    assert operations & {"Gelu", "BiasGelu"} and "Erf" not in operations
    made_by = {name: node.op_type for node in proto.graph.node for name in node.output}
    depthwise = [node for node in proto.graph.node if any(a.name == "group" and a.i > 1 for a in node.attribute)]
    transposed = [node for node in depthwise if made_by[node.input[0]] != "Conv"]
    assert len(transposed) == sum(name.endswith("mixer.conv") for name, _ in model.named_modules())


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["spectformer_ti", "svt_h_s"])
def test_onnx_of_any_size_resamples_as_torch_does(arch, tmp_path):
    kwargs = untrained.VANILLA if arch == "spectformer_ti" else untrained.PYRAMID
    untrained.save(tmp_path / "c.pth", arch, kwargs, input_size=(64, 32))
    session = onnxruntime.InferenceSession(write(tmp_path / "c.pth", "onnx", tmp_path / "m.onnx", "--dynamic-size"))
    model = load_checkpoint(tmp_path / "c.pth", model_kwargs={"dynamic_img_size": True}).model
    for size in ((64, 64), (96, 160), (192, 64)):
        (logits,) = session.run(None, {"images": images(*size).numpy()})
        assert torch.allclose(torch.from_numpy(logits), model(images(*size)), atol=1e-5)


@pytest.mark.slow
def test_an_exported_program_gives_the_models_logits_and_one_that_does_not_is_not_written(tmp_path, monkeypatch):
    model = untrained.save(tmp_path / "c.pth")
    files = {"model.json": ""}
    program = torch.export.load(write(tmp_path / "c.pth", "pt2", tmp_path / "m.pt2"), extra_files=files).module()
    for batch in (1, 5):
        assert torch.allclose(program(images(32, 32, batch=batch)), model(images(32, 32, batch=batch)), atol=1e-5)
    assert json.loads(json.loads(files["model.json"])["num_classes"]) == 10
    original, squashed = export.export, torch.nn.Tanh()
    monkeypatch.setattr(export, "export", lambda model, *how: original(torch.nn.Sequential(model, squashed), *how))
    with pytest.raises(MachineError, match="differ from the model's by .*; nothing was written"):
        write(tmp_path / "c.pth", "pt2", tmp_path / "n.pt2")
    assert not (tmp_path / "n.pt2").exists()


@pytest.mark.slow
def test_a_model_for_grey_images_is_exported(tmp_path):
    model = untrained.save(tmp_path / "c.pth", kwargs=untrained.VANILLA | {"in_chans": 1})
    program = torch.export.load(write(tmp_path / "c.pth", "pt2", tmp_path / "m.pt2")).module()
    grey = images(32, 32)[:, :1]
    assert torch.allclose(program(grey), model(grey), atol=1e-5)
    config = json.loads((write(tmp_path / "c.pth", "hub", tmp_path / "folder") / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]


@pytest.mark.slow
def test_a_model_of_timms_is_exported_too_but_not_for_any_size(tmp_path):
    model = untrained.save(tmp_path / "c.pth", "deit_tiny_patch16_224", {"embed_dim": 32, "depth": 1, "num_heads": 2})
    session = onnxruntime.InferenceSession(write(tmp_path / "c.pth", "onnx", tmp_path / "m.onnx"))
    (logits,) = session.run(None, {"images": images(32, 32).numpy()})
    assert torch.allclose(torch.from_numpy(logits), model(images(32, 32)), atol=1e-5)
    with pytest.raises(UserError, match="dynamic"):
        write(tmp_path / "c.pth", "onnx", tmp_path / "n.onnx", "--dynamic-size")


# ------------------------------------------------------------------------------------------------------------ mistakes
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "onx", "m.onnx"], "--to onx: choose one of .*; did you mean onnx?"),
        (["--to", "hub", "m", "--dynamic-size"], "--dynamic-size is for --to onnx"),
        (["--to", "pt2", "there.pt2"], "there.pt2: already exists; use --overwrite to replace it"),
        (["--to", "hub", "full"], "full: already exists"),
        (["--to", "safetensors", "m.pth"], "m.pth: the name must end in .safetensors"),
    ],
)
def test_mistakes_are_named_in_one_line_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    untrained.save(tmp_path / "c.pth")
    (tmp_path / "there.pt2").write_bytes(b"kept")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        export.main(["c.pth", *flags])
    assert sorted(tmp_path.rglob("*")) == before
