"""What a checkpoint from anybody can make infer.py do: nothing but to build the model that it holds."""

import pytest
import timm
import torch

import main_spectformer
from inference.from_checkpoint import build_from_checkpoint
from tests.untrained import VANILLA, save
from training import model_bounds
from training.model_bounds import constructor_arguments
from utils import UserError


def refusal(path, *args, **kwargs):
    """The line with which a checkpoint is refused."""
    with pytest.raises(UserError) as caught:
        build_from_checkpoint(path, *args, **kwargs)
    message = str(caught.value)
    assert path.name in message and "\n" not in message and len(message) < 1000
    return message


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("pretrained", True),
        ("pretrained_cfg", {"url": "http://localhost:9/weights.pth"}),
        ("pretrained_cfg_overlay", {"file": "/etc/passwd"}),
        ("pretrained_strict", False),
        ("pretrained_filter_fn", "os.system"),
        ("checkpoint_path", "/etc/passwd"),
        ("cache_dir", "/tmp"),
        ("features_only", True),
        ("out_indices", [0]),
        ("feature_cfg", {}),
        ("kwargs_filter", ["depth"]),
        ("scriptable", True),
        ("device", "meta"),
        ("dtype", "float16"),
        ("self", 1),
        ("kwargs", {}),
    ],
)
@pytest.mark.parametrize("arch", ["spectformer_ti", "resnet10t"])
def test_an_argument_that_is_not_the_models_own_is_refused(tmp_path, monkeypatch, arch, argument, value):
    save(tmp_path / "a.pth", instead={"arch": arch, "model_kwargs": {argument: value}})
    monkeypatch.setattr(timm.models._builder, "load_pretrained", lambda *args, **kwargs: pytest.fail("asked timm"))
    assert repr(argument) in refusal(tmp_path / "a.pth")


def test_fine_tuning_takes_no_argument_from_a_file_that_is_not_the_models_own(tmp_path):
    save(tmp_path / "a.pth", instead={"model_kwargs": VANILLA | {"pretrained": True}})
    with pytest.raises(UserError, match="a.pth: model_kwargs 'pretrained'"):
        main_spectformer.main(["--data-set", "DIGITS", "--finetune", str(tmp_path / "a.pth")])


def test_the_models_own_arguments_are_taken_ours_and_timms(tmp_path):
    assert {"depth", "alpha", "drop_path_rate", "in_chans"} <= constructor_arguments("spectformer_ti")
    assert {"mixing", "wavelet_backend", "spectral_depths", "token_label"} <= constructor_arguments("svt_h_s")
    assert constructor_arguments("svt_s") == constructor_arguments("svt_h_s")  # another name of it
    assert {"layers", "stem_type", "drop_path_rate"} <= constructor_arguments("resnet10t")  # its class takes no others
    kwargs = {"embed_dim": 48, "depth": 2, "num_heads": 3, "qkv_bias": False, "act_layer": "relu", "class_token": True}
    saved = save(tmp_path / "a.pth", "vit_tiny_patch16_224", kwargs)
    model, info = build_from_checkpoint(tmp_path / "a.pth")
    with torch.no_grad():
        assert torch.equal(model(torch.ones(1, 3, 32, 32)), saved(torch.ones(1, 3, 32, 32)))
    assert info.model_kwargs == kwargs


class Wide(torch.nn.Module):
    def __init__(self, depth=1, weights_from=None):
        super().__init__()


class Narrow(Wide):
    pretrained_cfg = {"architecture": "narrow"}

    def __init__(self, depth=1):
        super().__init__(depth)


def test_an_argument_that_a_models_class_does_not_pass_on_is_not_the_models(monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda _: Narrow())
    monkeypatch.setattr(model_bounds, "model_entrypoint", lambda _: lambda pretrained=False, **kwargs: Narrow(**kwargs))
    accepted = constructor_arguments.__wrapped__("narrow")
    assert "depth" in accepted and not accepted & {"weights_from", "pretrained", "self"}


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "kwargs",
    [
        {"depth": 10**6},
        {"embed_dim": 10**9},
        {"mlp_ratio": 1e300},
        {"mlp_ratio": float("nan")},
        {"img_size": [10**6, 10**6]},
        {"global_pool": "a" * 10**6},
        {"global_pool": [1] * 10**4},
        {"global_pool": nested(20)},
        {"global_pool": {"a": {"b": b"bytes"}}},
    ],
)
def test_arguments_of_no_models_size_or_kind_are_refused(tmp_path, kwargs):
    save(tmp_path / "a.pth", instead={"model_kwargs": VANILLA | kwargs})
    assert next(iter(kwargs)) in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "described",
    [
        {"model_kwargs": VANILLA | {"depth": 9_999}},
        {"model_kwargs": VANILLA | {"embed_dim": 8_192}},
        {"model_kwargs": VANILLA | {"mlp_ratio": 9_999.0, "embed_dim": 256}},
        {"input_size": [9_984, 9_984]},
        {"num_classes": 10**12},
        {"arch": "svt_h_s", "model_kwargs": {"depths": [9_999] * 4, "spectral_depths": [0] * 4}},
        {"arch": "vit_tiny_patch16_224", "model_kwargs": {"depth": 9_999, "embed_dim": 48}},
        {"arch": "resnet10t", "model_kwargs": {"layers": [9_999] * 4}},
    ],
)
def test_a_model_that_outgrows_the_files_tensors_is_not_built(tmp_path, monkeypatch, described):
    save(tmp_path / "a.pth", instead={"class_names": None} | described)
    built = []
    register = torch.nn.Module.register_parameter
    monkeypatch.setattr(torch.nn.Module, "register_parameter", lambda *args: built.append(args[-1]) or register(*args))
    refusal(tmp_path / "a.pth")
    assert len(built) < 3_000 and all(weight is None or weight.is_meta for weight in built)


@pytest.mark.parametrize(
    ("arch", "kwargs"),
    [
        ("spectformer_ti", {"embed_dim": -1}),
        ("spectformer_ti", {"embed_dim": 0}),
        ("spectformer_ti", {"depth": 1.5}),
        ("spectformer_ti", {"num_heads": "many"}),
        ("spectformer_ti", {"img_size": {}}),
        ("spectformer_ti", {"mlp_ratio": []}),
        ("svt_h_s", {"embed_dims": []}),
        ("svt_h_s", {"num_heads": [0, 0, 0, 0]}),
        ("svt_h_s", {"depths": 3}),
        ("resnet10t", {"layers": {"a": 1}}),
    ],
)
def test_a_constructors_own_complaints_become_one_line(tmp_path, arch, kwargs):
    save(tmp_path / "a.pth", instead={"arch": arch, "model_kwargs": kwargs})
    refusal(tmp_path / "a.pth")


@pytest.mark.parametrize("arch", ["hf-hub:somebody/model", "local-dir:/etc", "resnet18.no_such_tag", "\x1b[2J", ""])
def test_an_arch_that_is_no_registered_model_is_refused(tmp_path, arch):
    save(tmp_path / "a.pth", instead={"arch": arch})
    refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mean", [True, True, True]),
        ("mean", ["a", "b", "c"]),
        ("mean", [float("nan")] * 3),
        ("std", [0.5, 0.5, 1e-300]),
        ("std", [0.5, 0.5]),
        ("crop_pct", 1e-300),
        ("crop_pct", float("nan")),
        ("crop_pct", 2),
        ("interpolation", "psychic"),
        ("input_size", [32.0, 32.0]),
        ("input_size", [True, True]),
        ("input_size", [0, 32]),
        ("input_size", 10**9),
        ("class_names", list(range(10))),
        ("class_names", [None] * 10),
        ("data_set", 5),
        ("classes", 7),
        ("classes", [1, 2]),
    ],
)
def test_a_field_of_the_wrong_kind_or_size_is_named(tmp_path, field, value):
    damage = {"args": {field: value}} if field in ("data_set", "classes") else {field: value}
    save(tmp_path / "a.pth", instead=damage)
    assert f"its {field!r}" in refusal(tmp_path / "a.pth")


def test_fields_that_are_none_count_as_not_there(tmp_path):
    nothing = dict.fromkeys(("class_names", "mean", "std", "crop_pct", "interpolation", "args"))
    save(tmp_path / "a.pth", instead=nothing)
    _, info = build_from_checkpoint(tmp_path / "a.pth")
    assert (info.class_names, info.crop_pct, info.interpolation) == (None, 0.875, "bicubic")
    assert info.class_name(3) == "3" and info.data_set is None


def test_bare_weights_of_an_absurd_grid_are_refused(tmp_path):
    weights = {"patch_embed.proj.weight": torch.zeros(1, 3, 1, 50_000), "pos_embed": torch.zeros(1, 40_000, 1)}
    torch.save(weights | {"blocks.0.filter.complex_weight": torch.zeros(200, 101, 1, 2)}, tmp_path / "bare.pth")
    assert "--arch" in refusal(tmp_path / "bare.pth")
    refusal(tmp_path / "bare.pth", "spectformer_ti")
