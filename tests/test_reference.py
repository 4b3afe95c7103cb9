"""The plain formulation is the oracle of the fast one: it has to be right itself, and the two have to agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import timm
import torch
from golden import recipe

from models import load_weights

GOLDEN = Path(__file__).parent / "golden"
LABELS = {"token_label": True}
BOX = (0, 1, 2, 2)


def oracle(name, **options):
    """A plain model whose weights are those of the golden files' recipe, at any size."""
    model = reference.create(name, **options)
    for key, tensor in model.state_dict().items():
        if ".xfm." not in key and ".ifm." not in key:
            tensor.copy_(torch.from_numpy(recipe.tensor(key, tuple(tensor.shape))))
    return model


def images(batch, size):
    return torch.from_numpy(recipe.images(batch, size, size))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "name", "options"),
    [
        ("spectformer_ti", "spectformer_ti", {}),
        ("spectformer_h_s", "spectformer_h_s", LABELS),
        ("svt_h_s_channel_token", "svt_h_s", LABELS | {"mixing": "channel_token"}),
        ("svt_h_s_alpha2", "svt_h_s", LABELS | {"alpha": 2}),
    ],
)
@torch.no_grad()
def test_plain_formulation_computes_what_the_released_code_does(variant, name, options):
    facts = json.loads((GOLDEN / f"{variant}.json").read_text())
    model = oracle(name, **options).eval()
    difference = (
        model(images(facts["batch"], facts["image_size"])).numpy() - np.load(GOLDEN / f"{variant}.npz")["logits"]
    )
    assert sum(p.numel() for p in model.parameters()) == facts["params"]
    assert np.abs(difference).max() <= 2e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plain_options", "options"),
    [
        ("spectformer_xs", {}, {}),
        ("spectformer_h_s", {}, {}),
        ("svt_h_s", LABELS, LABELS),
        ("svt_h_s", {"mixing": "token"}, {"mixing": "token"}),
        ("svt_vanilla_xs", {}, {}),
        (
            "svt_h_b",
            {"mixing": "channel_token", "alpha": 2},
            {"mixing": "channel_token", "spectral_depths": (3, 4, 0, 0)},
        ),
    ],
)
def test_fast_and_plain_models_agree_in_values_and_gradients(name, plain_options, options):
    shape = {"img_size": 64, "num_classes": 10}
    plain = oracle(name, **shape, **plain_options)
    fast = timm.create_model(name, **shape, drop_path_rate=0.0, **options)
    load_weights(fast, plain.state_dict())
    box = (BOX,) if "token_label" in options else ()
    outputs, gradients = [], []
    for model in (plain, fast):
        x = images(2, 64).requires_grad_()
        with torch.no_grad():
            evaluated = model.eval()(x)
        trained = model.train()(x, *box)
        trained = torch.cat([part.flatten() for part in trained[:2]]) if box else trained
        (trained * torch.linspace(-1, 1, trained.numel()).view_as(trained)).sum().backward()
        outputs.append((evaluated, trained.detach()))
        gradients.append(x.grad)
    for ours, theirs in zip(*outputs, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[0].norm()
