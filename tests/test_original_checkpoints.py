import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from golden import recipe

from models import WeightMismatch, load_weights, to_original

GOLDEN = Path(__file__).parent / "golden"
LABELS = {"token_label": True}
VARIANTS = {
    "spectformer_ti": ("spectformer_ti", {}),
    "spectformer_xs": ("spectformer_xs", {}),
    "spectformer_h_s": ("spectformer_h_s", LABELS),
    "spectformer_h_s_no_token_label": ("spectformer_h_s", {}),
    "svt_h_s": ("svt_h_s", LABELS),
    "svt_h_l": ("svt_h_l", LABELS),
    "svt_h_s_channel_token": ("svt_h_s", LABELS | {"mixing": "channel_token"}),
    "svt_h_s_alpha2": ("svt_h_s", LABELS | {"spectral_depths": (3, 4, 0, 0)}),
}


def original_weights(variant):
    weights = recipe.state_dict(GOLDEN / f"{variant}.keys.json")
    return {name: torch.from_numpy(value) for name, value in weights.items()}


def expected(variant):
    return json.loads((GOLDEN / f"{variant}.json").read_text()), np.load(GOLDEN / f"{variant}.npz")


def images(facts):
    return torch.from_numpy(recipe.images(facts["batch"], facts["image_size"], facts["image_size"]))


def record_blocks(model):
    """Mean and standard deviation of every block's output, by the authors' name of the block."""
    statistics = {}

    def watch(name, module):
        def record(_module, _inputs, output):
            statistics[name] = (output.mean().item(), output.std().item())

        module.register_forward_hook(record)

    if hasattr(model, "blocks"):
        for i, block in enumerate(model.blocks):
            watch(f"blocks.{i}", block)
    else:
        for i, stage in enumerate(model.stages):
            for j, block in enumerate(stage.blocks):
                watch(f"block{i + 1}.{j}", block)
        watch("post_network.0", model.class_block)
    return statistics


def assert_blocks_agree(statistics, facts):
    for name, (mean, std) in facts["block_output_mean_std"].items():
        assert statistics[name] == pytest.approx((mean, std), rel=1e-4, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_original_checkpoints_give_the_original_results_and_go_back_bit_for_bit(variant):
    name, arguments = VARIANTS[variant]
    facts, arrays = expected(variant)
    weights = original_weights(variant)
    model = timm.create_model(name, **arguments).eval()
    assert load_weights(model, weights) == []
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["params"]

    statistics = record_blocks(model)
    x = images(facts).requires_grad_()
    logits = model(x)
    assert (logits - torch.from_numpy(arrays["logits"])).abs().max() <= 2e-4
    assert_blocks_agree(statistics, facts)

    (logits * torch.from_numpy(recipe.output_weights(1000))).sum().backward()
    assert x.grad.norm().item() == pytest.approx(float(arrays["input_grad_norm"]), rel=1e-3)
    gradients = to_original({name: parameter.grad for name, parameter in model.named_parameters()})
    assert gradients.keys() == facts["grad_norm"].keys()
    for parameter, norm in facts["grad_norm"].items():
        assert gradients[parameter].norm().item() == pytest.approx(norm, rel=1e-3), parameter

    back = to_original(model.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], value) for key, value in weights.items())


@pytest.mark.slow
def test_weights_of_224_pixels_at_384_follow_the_authors_rule():
    facts, arrays = expected("spectformer_xs_384")
    weights = original_weights("spectformer_xs_384")
    model = timm.create_model("spectformer_xs", img_size=384).eval()
    load_weights(model, weights)
    statistics = record_blocks(model)
    with torch.inference_mode():
        logits = model(images(facts))
    assert (logits - torch.from_numpy(arrays["logits"])).abs().max() <= 2e-4
    assert_blocks_agree(statistics, facts)
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["params"]

    resized = timm.create_model("spectformer_xs")
    load_weights(resized, weights)
    resized.set_input_size(384)
    for name, value in model.state_dict().items():
        assert torch.equal(resized.state_dict()[name], value), name


# The rest concerns names and shapes, for which small models do.
SMALL = {
    "img_size": 64,
    "num_classes": 10,
    "stem_width": 8,
    "embed_dims": (16, 32, 32, 64),
    "depths": (1, 1, 1, 1),
    "mlp_ratios": (2, 2, 2, 2),
}
SMALL_VANILLA = {"img_size": 64, "num_classes": 10, "embed_dim": 64, "depth": 5}
FAMILIES = {
    "vanilla": ("spectformer_ti", SMALL_VANILLA),
    "svt_vanilla": ("svt_vanilla_ti", SMALL_VANILLA),
    "spectformer_h": ("spectformer_h_s", SMALL | LABELS),
    "svt": ("svt_s", SMALL | LABELS | {"mixing": "channel_token"}),
}


def small(family, **arguments):
    name, small_arguments = FAMILIES[family]
    return timm.create_model(name, **small_arguments | arguments).eval()


def original_file(family, **arguments):
    torch.manual_seed(0)
    return to_original(small(family, **arguments).state_dict())


LAYOUTS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 3},
    "model and state_dict": lambda weights: {"model": {"state_dict": weights}, "args": None},
    "state_dict": lambda weights: {"state_dict": weights},
    "DDP": lambda weights: {"model": {f"module.{name}": value for name, value in weights.items()}},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(family, layout):
    weights = original_file(family)
    model = small(family)
    assert load_weights(model, LAYOUTS[layout](weights)) == []
    back = to_original(model.state_dict())
    assert all(torch.equal(back[name], value) for name, value in weights.items())


def test_our_own_names_load_too():
    model, other = small("svt"), small("svt")
    load_weights(other, model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_wavelet_filters_in_a_file_are_ignored():
    weights = original_file("svt")
    weights["block1.0.attn.xfm.h0o"] = torch.zeros(1, 1, 13, 1)
    weights["block1.0.attn.ifm.g0o"] = torch.zeros(1, 1, 19, 1)
    load_weights(small("svt"), weights)


def test_token_label_head_of_a_file_is_dropped_by_a_model_without_and_missed_by_one_with():
    weights = original_file("svt")
    load_weights(small("svt", token_label=False), weights)
    del weights["aux_head.weight"], weights["aux_head.bias"]
    with pytest.raises(WeightMismatch, match='Missing key.*"aux_head.weight", "aux_head.bias"'):
        load_weights(small("svt"), weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_leaves_exactly_the_heads_untouched(family):
    model = small(family, num_classes=3)
    heads = {name: value.clone() for name, value in model.state_dict().items() if "head." in name}
    assert load_weights(model, original_file(family), new_head=True) == list(heads)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in heads.items())


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


def with_entry(name, value):
    return lambda weights: weights | {name: value}


FAULTS = {
    "missing": (without("block2.0.norm1.bias"), r"Missing key.*stages\.1\.blocks\.0\.norm1\.bias"),
    "half of q and kv": (without("block2.0.attn.kv.weight"), r"mixer\.qkv\.weight.*mixer\.q\.weight"),
    "unexpected": (with_entry("block1.7.norm1.bias", torch.zeros(2)), r"Unexpected key.*stages\.0\.blocks\.7"),
    "shape": (with_entry("norm3.bias", torch.zeros(3)), r"size mismatch for stages\.2\.norm\.bias.*\[3\].*\[32\]"),
    "no tensor": (with_entry("norm3.bias", "oops"), r"stages\.2\.norm\.bias.*<class 'str'>"),
    "empty": (lambda _: {}, "Missing key"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_is_refused_by_name(fault):
    spoil, message = FAULTS[fault]
    with pytest.raises(WeightMismatch, match=message) as error:
        load_weights(small("svt"), spoil(original_file("svt")))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_another_family_is_refused(family):
    others = [other for other in FAMILIES if other != family]
    for other in others:
        with pytest.raises(WeightMismatch):
            load_weights(small(family), original_file(other))


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_at_another_resolution_is_set_input_size(family):
    source = small(family, img_size=(64, 96))
    target = small(family, img_size=(90, 70))
    load_weights(target, to_original(source.state_dict()))
    source.set_input_size((90, 70))
    assert source.state_dict().keys() == target.state_dict().keys()
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


@pytest.mark.parametrize("family", ["vanilla", "svt_vanilla"])
def test_a_grid_of_the_same_number_of_patches_but_another_shape_is_resampled(family):
    wide, tall = small(family, img_size=(64, 144)), small(family, img_size=(96, 96))
    load_weights(tall, wide.state_dict())
    assert not torch.equal(tall.pos_embed, wide.pos_embed)
    wide.set_input_size(96)
    assert torch.equal(tall.pos_embed, wide.pos_embed)


def test_other_timm_models_load_strictly_by_their_own_names():
    arguments = {"img_size": 32, "patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
    weights = timm.create_model("deit_tiny_patch16_224", **arguments).state_dict()
    assert load_weights(timm.create_model("deit_tiny_patch16_224", **arguments), {"model": weights}) == []
    model = timm.create_model("deit_tiny_patch16_224", num_classes=7, **arguments)
    with pytest.raises(WeightMismatch, match="head.weight"):
        load_weights(model, weights)
    assert load_weights(model, weights, new_head=True) == ["head.weight", "head.bias"]


def create_pretrained(family, path, **arguments):
    overlay = {"file": str(path), "num_classes": 10}
    return small(family, pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_timm_loads_the_authors_files(family, layout, tmp_path):
    weights = original_file(family)
    torch.save(LAYOUTS[layout](weights), tmp_path / "weights.pth")
    back = to_original(create_pretrained(family, tmp_path / "weights.pth").state_dict())
    assert all(torch.equal(back[name], value) for name, value in weights.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_timm_adapts_classes_channels_and_resolution(family, tmp_path):
    weights = original_file(family)
    torch.save({"model": weights}, tmp_path / "weights.pth")
    model = create_pretrained(family, tmp_path / "weights.pth", num_classes=3, in_chans=1, img_size=96)
    assert model(torch.zeros(1, 1, 96, 96)).shape == (1, 3)
    vanilla = "vanilla" in family
    original = weights["patch_embed.proj.weight" if vanilla else "patch_embed1.conv.0.weight"]
    own = model.patch_embed.proj if vanilla else model.stem.conv[0]
    assert torch.allclose(own.weight, original.sum(1, keepdim=True), atol=1e-6)


def test_timm_builds_features_from_the_authors_files(tmp_path):
    weights = original_file("svt")
    torch.save({"model": weights}, tmp_path / "weights.pth")
    features = create_pretrained("svt", tmp_path / "weights.pth", features_only=True, token_label=False)
    assert torch.equal(features.model.stem.proj.weight, weights["patch_embed1.proj.weight"])
    assert [f.shape[1] for f in features(torch.zeros(1, 3, 64, 64))] == [16, 32, 32, 64]
