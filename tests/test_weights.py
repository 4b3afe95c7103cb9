"""The weights that come with the package: loaded offline by timm, used by infer.py."""

import hashlib
import re
import socket
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_image
from timm.data import resolve_model_data_config

import infer
import models
from utils import UserError

SHIPPED = models.shipped()
SIDES = {name: timm.get_pretrained_cfg(name).input_size[-1] for name in SHIPPED}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("no network in a test")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def images(channels=3, *, side):
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", SHIPPED)
def test_timm_loads_the_weights_of_the_file_with_names_for_their_classes(name):
    file = load_file(SHIPPED[name])
    assert {tensor.dtype for tensor in file.values()} == {torch.float16, torch.int64}
    for source in (name, SHIPPED[name].stem):
        model = timm.create_model(source, pretrained=True).eval()
        assert all(torch.equal(weight, file[key].to(weight.dtype)) for key, weight in model.state_dict().items())
    names = model.pretrained_cfg["label_names"]
    assert model(images(side=SIDES[name])).shape == (2, 10) and len(names) == 10
    assert (names[0], names[9]) in (("airplane", "truck"), ("tench", "parachute"))
    assert resolve_model_data_config(model)["input_size"] == (3, SIDES[name], SIDES[name])
    loaded = models.load_checkpoint(SHIPPED[name])
    assert [loaded.label(i).split(" ", loaded.class_names[i].startswith("n0"))[-1] for i in range(10)] == list(names)
    for setting in ("crop_pct", "mean", "std"):
        assert getattr(loaded, setting) == model.pretrained_cfg[setting]
    assert not torch.equal(timm.create_model(name).head.weight, model.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_pretrained_weights_are_fitted_to_other_classes_channels_and_sizes(name):
    side = SIDES[name]
    rgb = images(side=side)
    whole = timm.create_model(name, pretrained=True).eval()
    fewer = timm.create_model(name, pretrained=True, num_classes=3).eval()
    assert fewer(rgb).shape == (2, 3)
    assert torch.equal(fewer.forward_features(rgb), whole.forward_features(rgb))
    none = timm.create_model(name, pretrained=True, num_classes=0).eval()
    assert torch.equal(none(rgb), whole.forward_head(whole.forward_features(rgb), pre_logits=True))
    grey = timm.create_model(name, pretrained=True, in_chans=1).eval()
    one = images(1, side=side)
    assert torch.allclose(grey(one), whole(one.expand(-1, 3, -1, -1)), atol=2e-3)
    large = timm.create_model(name, pretrained=True, img_size=2 * side).eval()
    whole.set_input_size(2 * side)
    assert torch.allclose(large(images(side=2 * side)), whole(images(side=2 * side)), atol=1e-4)


def test_each_file_of_weights_has_at_most_five_megabytes_its_card_log_and_curve():
    for path in SHIPPED.values():
        assert path.stat().st_size <= 5e6
        card = path.with_suffix(".md").read_text()
        for word in ("Data", "Recipe", "Seeds", "Limits", "Licence", "top-1"):
            assert word in card
        assert path.with_suffix(".png").exists() and path.with_suffix(".log.txt").exists()
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest in card  # the card is of this very file
        top1 = [float(figure) for figure in re.findall(r"\| ([0-9.]+) % \| [0-9.]+ % \|", card)]
        assert len(top1) == 2 and abs(top1[0] - top1[1]) < 0.3  # float16 costs no accuracy


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--arch", "--model-path"])
@pytest.mark.parametrize("name", SHIPPED)
def test_infer_answers_by_the_name_of_a_model_alone(name, flag, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(load_sample_image("flower.jpg")).save("photo.png")
    infer.main([flag, name.replace("_", "-"), "--image", "photo.png", "--num-workers", "0", "--explain"])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("photo.png: ") and line.count(" %") == 5
    assert any(word in line for word in timm.get_pretrained_cfg(name).label_names)
    assert [path.name for path in Path("explained").iterdir()] == ["photo_explained.png"]
    with pytest.raises(UserError, match="does not know 10 of its 10 classes: 0, 1"):
        infer.main([flag, name, "--data-set=DIGITS", "--num-workers=0"])


@pytest.mark.parametrize("words", ["--arch svt_h_s", "--model-path resnet50", ""])
def test_a_model_without_weights_of_its_own_is_refused_with_those_that_have_some(words):
    with pytest.raises((UserError, models.CheckpointError), match="spectformer_h_ti, svt_h_n, svt_h_ti"):
        infer.main([*words.split(), "--image", "x.png"])
