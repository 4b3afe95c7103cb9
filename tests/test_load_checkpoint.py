"""models.load_checkpoint: a model with its transform and class names, from a file, a run directory or a name."""

import argparse
import pathlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import models
from models import CheckpointError, load_checkpoint
from tests.golden import recipe
from tests.untrained import PYRAMID, VANILLA, save

PLAIN = {name: value for name, value in VANILLA.items() if name != "alpha"}
GOLDEN = Path(__file__).parent / "golden"


def bare(variant):
    """The weights of a published variant as the authors store them."""
    weights = recipe.state_dict(GOLDEN / f"{variant}.keys.json")
    return {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "arch", "arguments"),
    [
        ("spectformer_ti", "spectformer-ti", {}),
        ("svt_h_s", "svt-s", {}),  # with token labels, which the weights show
        ("svt_h_s_channel_token", "svt_h_s", {"mixing": "channel_token"}),
    ],
)
def test_a_bare_file_of_the_authors_gives_the_golden_logits_once_its_model_is_named(tmp_path, variant, arch, arguments):
    path = tmp_path / "authors.pth"
    weights = {f"module.{name}": value for name, value in bare(variant).items()}
    torch.save({"model": {"state_dict": weights}, "args": argparse.Namespace(out=pathlib.PosixPath("a"))}, path)
    with pytest.raises(CheckpointError, match=r"authors.pth: it only contains weights; set --arch to their model"):
        load_checkpoint(path)
    loaded = load_checkpoint(path, arch, model_kwargs=arguments)
    golden = np.load(GOLDEN / f"{variant}.npz")["logits"]
    images = torch.from_numpy(recipe.images(len(golden), 224, 224))
    with torch.no_grad():
        assert np.abs(loaded.model(images).numpy() - golden).max() <= 2e-4
    assert loaded.input_size == (224, 224) and loaded.num_classes == 1000
    assert loaded.class_names[0] == "n01440764" and loaded.label(0) == "n01440764 tench"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "arguments"),
    [
        ("spectformer_ti", {"img_size": (224, 160)} | VANILLA),
        ("spectformer_ti", {"img_size": (32, 48), "mixers": "attention,spectral", "patch_size": 8} | PLAIN),
        ("spectformer_ti", {"img_size": (48, 48), "mixers": "attention*2"} | PLAIN),
        ("svt_vanilla_ti", {"img_size": (256, 192)} | VANILLA),
        ("svt_vanilla_ti", {"img_size": (112, 80)} | VANILLA),  # low-pass weights of an odd grid are made even
        ("spectformer_h_s", {"img_size": (384, 384)} | PYRAMID),
        ("spectformer_h_n", {"img_size": (64, 96)} | PYRAMID),  # whose stem has a stride of 2
        ("spectformer_h_n", {"img_size": (32, 32), "stem_stride": 1} | PYRAMID),
        ("svt_h_s", {"img_size": (96, 224)} | PYRAMID),
    ],
    ids=str,
)
def test_bare_weights_show_the_image_size_that_they_were_made_for(tmp_path, arch, arguments):
    torch.manual_seed(0)
    expected = timm.create_model(arch, num_classes=7, **arguments).eval()
    torch.save(expected.state_dict(), tmp_path / "bare.pth")
    kwargs = {name: value for name, value in arguments.items() if name != "img_size"}
    loaded = load_checkpoint(tmp_path / "bare.pth", arch, model_kwargs=kwargs)
    images = torch.randn(1, 3, *expected.img_size)
    assert loaded.input_size == expected.img_size and loaded.class_names == tuple("0123456")
    with torch.no_grad():
        assert torch.equal(loaded.model(images), expected(images))


def test_our_checkpoint_describes_its_model_classes_and_preprocessing(tmp_path):
    kwargs = PYRAMID | {"mixing": "token", "token_label": True}
    saved = save(tmp_path / "a.pth", "svt_h_s", kwargs, ("cat", "n01440764"), (64, 96), epoch=3)
    loaded = load_checkpoint(tmp_path / "a.pth", "svt-s")
    larger = load_checkpoint(tmp_path / "a.pth", input_size=(128, 96))
    assert larger.input_size == (128, 96) and larger.transform(Image.new("RGB", (9, 9))).shape == (3, 128, 96)
    photograph = Image.effect_noise((150, 120), 80).convert("RGB")
    with torch.no_grad():
        image = loaded.transform(photograph)
        assert torch.equal(loaded.model(image[None]), saved(image[None]))
    assert loaded.class_names == ("cat", "n01440764") and loaded.input_size == (64, 96)
    assert [loaded.label(i) for i in range(2)] == ["cat", "n01440764 tench"] and loaded.checkpoint["epoch"] == 3
    settings = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_pct": 1.0, "interpolation": "bilinear"}
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert torch.equal(image, timm.data.create_transform((64, 96), **settings)(photograph))


def test_a_name_and_a_run_directory_are_sources_too(tmp_path):
    loaded = load_checkpoint("SpectFormer-H-N")
    assert loaded.path == models.shipped()["spectformer_h_n"] and loaded.class_names[0] == "airplane"
    save(tmp_path / "checkpoint_last.pth", classes=("a", "b"))
    assert load_checkpoint(tmp_path).class_names == ("a", "b")
    save(tmp_path / "checkpoint_best.pth", classes=("c", "d"))
    assert load_checkpoint(tmp_path).class_names == ("c", "d")
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("spectformer_h_l", "only for spectformer_h_n"),
        (tmp_path / "empty", "neither che"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(source)


def test_the_averaged_weights_are_used_where_there_are_any(tmp_path):
    trained = timm.create_model("spectformer_ti", num_classes=10, img_size=32, **VANILLA).state_dict()
    averaged = {name: value + 1 for name, value in trained.items()}
    save(tmp_path / "a.pth", model=trained, model_ema=averaged)
    for flag, expected in ((None, averaged), (True, averaged), (False, trained)):
        loaded = load_checkpoint(tmp_path / "a.pth", ema=flag)
        assert torch.equal(loaded.model.norm.bias, expected["norm.bias"])
        assert loaded.ema == (expected is averaged)
    save(tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="no-ema"):
        load_checkpoint(tmp_path / "b.pth", ema=True)


def test_a_model_of_timms_loads_too(tmp_path):
    torch.manual_seed(0)
    peer = timm.create_model("resnet10t", num_classes=7).eval()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    loaded = load_checkpoint(tmp_path / "peer.pth", "resnet10t", input_size=64)
    assert loaded.num_classes == 7 and loaded.input_size == (64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.model(torch.ones(1, 3, 64, 64)), peer(torch.ones(1, 3, 64, 64)))


@pytest.mark.parametrize(
    ("damage", "arch", "named"),
    [
        ({}, "svt-h-s", "it contains spectformer_ti, not svt-h-s"),
        ({"arch": None}, "spectformer_tj", "no such model; did you mean spectformer_t"),
        ({"arch": None}, "resnet10t", "no classifier fc.weight"),
        ({"arch": None}, "svt_vanilla_ti", "the weights do not fit the model"),
        ({"arch": "spectformer_h_s"}, None, "embed_dim"),
        ({"class_names": ["a"]}, None, "names 1 classes, but its classifier has 10"),
        ({"model_kwargs": {"no_such_argument": 1}}, None, "no_such_argument"),
        ({"model_kwargs": {"checkpoint_path": "/etc/passwd"}}, None, "checkpoint_path"),
        ({"arch": "hf-hub:timm/resnet18"}, None, "no such model"),
        ({"detector": "mask_rcnn"}, None, "contains a detector"),
        ({"model": {"head.weight": torch.ones(10, 3)}}, None, "Missing key"),
    ],
)
def test_a_checkpoint_that_contradicts_itself_or_the_call_is_refused_by_name(tmp_path, damage, arch, named):
    save(tmp_path / "a.pth", instead=damage)
    with pytest.raises(CheckpointError, match=named) as caught:
        load_checkpoint(tmp_path / "a.pth", arch, model_kwargs=VANILLA if damage.get("arch", 1) is None else None)
    assert "\n" not in str(caught.value)


OTHERS = {"stem_stride": 4, "depths": (1, 2, 1, 1), "num_heads": (1, 1, 1, 1), "mixers": "pool/spectral/attention/pool"}


@pytest.mark.slow
@pytest.mark.parametrize("argument", OTHERS)
def test_timm_refuses_the_weights_of_a_model_with_other_arguments_and_shows_the_right_call(tmp_path, argument):
    kwargs = PYRAMID | {"stem_stride": 2, "num_heads": (2, 2, 2, 2)}
    saved = save(tmp_path / "a.pth", "spectformer_h_n", kwargs)
    overlay = {"file": str(tmp_path / "a.pth"), "num_classes": 10}
    with pytest.raises(CheckpointError, match="its weights are of another model") as caught:
        timm.create_model(
            "spectformer_h_n", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs | {argument: OTHERS[argument]}
        )
    assert f"spectformer_h_n with {kwargs}" in str(caught.value)
    again = eval(str(caught.value).split("load the file with ")[-1], {"models": models}).model
    with torch.no_grad():
        assert torch.equal(again(torch.ones(1, 3, 32, 32)), saved(torch.ones(1, 3, 32, 32)))
