"""The checks of timm's test suite, for all registered models at small widths."""

import copy
import pickle

import pytest
import torch
from small_models import KINDS, PYRAMID, VANILLA, create, images, is_small, is_vanilla
from timm.models import group_parameters
from timm.models._input import get_model_input_config
from timm.optim import create_optimizer_v2

from models import ARCHITECTURES, Pyramid
from models.layers import Block


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_and_backward_reach_every_parameter(name):
    model = create(name).train()
    logits = model(images())
    assert logits.shape == (2, 10) and logits.isfinite().all()
    logits.square().mean().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_default_cfg_describes_the_model(name):
    model = create(name)
    cfg = model.default_cfg
    assert cfg["architecture"] in (name, name.replace("svt_", "svt_h_"))
    assert cfg["pool_size"] is None  # unpooled features are a token sequence
    tiny = name.endswith("_h_ti")
    assert cfg["num_classes"] == (10 if is_small(name) or tiny else 1000) and cfg["license"] == "mit"
    size, crop = (224, 0.875 if is_vanilla(name) else 0.96)
    size, crop = (32, 1.0) if is_small(name) else (128, 0.875) if tiny else (size, crop)
    assert cfg["input_size"] == (3, size, size) and cfg["crop_pct"] == crop
    assert cfg["interpolation"] == "bicubic" and cfg["mean"] == (0.485, 0.456, 0.406)
    assert not cfg.get("url")
    assert {f"{cfg['first_conv']}.weight", f"{cfg['classifier']}.weight"} <= model.state_dict().keys()
    assert get_model_input_config(model)["input_size"] == (3, 64, 64)


def test_both_heads_are_the_classifier_of_a_model_with_token_labels():
    model = create("svt_s", token_label=True)
    assert model.default_cfg["classifier"] == ("head", "aux_head")
    assert {"head.weight", "aux_head.weight"} <= model.state_dict().keys()


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("labels", [False, True])
def test_classifier_can_be_replaced_and_removed(name, labels):
    if labels and is_vanilla(name):
        return
    model = create(name, **({"token_label": True} if labels else {})).eval()
    features = model.forward_features(images())
    assert features.ndim == 3 and features.shape[-1] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    assert torch.equal(model.forward_head(features), model(images()))
    assert model.get_classifier() is model.head

    model.reset_classifier(3)
    assert model(images()).shape == (2, 3) and model.num_classes == 3
    model.reset_classifier(0)
    assert torch.equal(model(images()), pooled) and model.num_classes == 0
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), features)
    model.reset_classifier(4, "avg")
    assert model(images()).shape == (2, 4)
    logits = model.train()(images())
    assert logits[1].shape == (2, 4, 4) if labels else logits.shape == (2, 4)
    model.reset_classifier(0)
    assert model(images()).shape == pooled.shape


@pytest.mark.parametrize("name", KINDS)
def test_a_model_can_be_built_without_classifier_or_pooling(name):
    assert create(name, num_classes=0)(images()).shape == (2, 64)
    assert create(name, num_classes=0, global_pool="")(images()).ndim == 3


@pytest.mark.parametrize("name", KINDS)
def test_intermediates_are_the_forward_pass(name):
    model = create(name).eval()
    final, features = model.forward_intermediates(images())
    assert torch.equal(final, model.forward_features(images()))
    assert len(features) == len(model.feature_info)
    for feature, info in zip(features, model.feature_info, strict=True):
        side = 64 // info["reduction"]
        assert feature.shape == (2, info["num_chs"], side, side) and feature.is_contiguous()
    channels_last = model.forward_intermediates(images(), output_fmt="NHWC", intermediates_only=True)
    assert all(torch.equal(a.permute(0, 2, 3, 1), b) for a, b in zip(features, channels_last, strict=True))
    normed = model.forward_intermediates(images(), indices=1, norm=True, intermediates_only=True)[0]
    assert torch.allclose(normed, model.norm(features[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2), atol=1e-6)
    with pytest.raises(ValueError, match="HWC"):
        model.forward_intermediates(images(), output_fmt="HWC")


@pytest.mark.parametrize("name", KINDS)
def test_chosen_intermediates_can_stop_early_and_prune_the_rest(name):
    model = create(name).eval()
    everything = model.forward_intermediates(images(), intermediates_only=True)
    ran = []
    last = (model.stages[-1].blocks if isinstance(model, Pyramid) else model.blocks)[-1]
    last.register_forward_hook(lambda *_: ran.append(True))
    early = model.forward_intermediates(images(), indices=[0, -3], stop_early=True, intermediates_only=True)
    assert not ran
    kept = [0, len(everything) - 3]
    assert all(torch.equal(a, everything[i]) for a, i in zip(early, kept, strict=True))
    model.forward_intermediates(images(), indices=[0], stop_early=True)
    assert not ran

    assert model.prune_intermediate_layers([0, -3], prune_norm=True) == kept
    pruned = model.forward_intermediates(images(), indices=kept, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, early, strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_features_only(name):
    model = create(name, features_only=True)
    strides = [16] * 3 if is_vanilla(name) else [2, 4, 8, 16] if is_small(name) else [4, 8, 16, 32]
    assert model.feature_info.reduction() == strides
    features = model(images())
    assert [f.shape[1] for f in features] == model.feature_info.channels()
    assert [64 // f.shape[2] for f in features] == strides
    chosen = create(name, features_only=True, out_indices=(0, 2))(images())
    assert [64 // f.shape[2] for f in chosen] == strides[:3:2]


@pytest.mark.parametrize("name", KINDS)
def test_parameters_are_grouped_by_depth(name):
    model = create(name)
    layer_of = group_parameters(model, model.group_matcher(), reverse=True)
    assert layer_of.keys() == dict(model.named_parameters()).keys()
    blocks = sum(PYRAMID["depths"]) if isinstance(model, Pyramid) else VANILLA["depth"]
    class_block = isinstance(model, Pyramid)
    assert max(layer_of.values()) == blocks + class_block + 1  # the stem is layer 0, the head the last layer
    assert layer_of["head.weight"] == max(layer_of.values())
    assert layer_of["norm.weight"] == layer_of["head.weight"] - 1
    assert min(layer_of.values()) == 0 == layer_of["stem.proj.weight" if class_block else "pos_embed"]
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) <= max(layer_of.values())
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, layer_decay=0.5)
    rates = {group["lr_scale"] for group in optimizer.param_groups}
    assert rates == {0.5**i for i in range(max(layer_of.values()) + 1)}


def test_position_embeddings_are_not_decayed():
    model = create("spectformer_xs")
    optimizer = create_optimizer_v2(model, "adamw", lr=1.0, weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert id(model.pos_embed) not in decayed and id(model.norm.weight) not in decayed
    assert id(model.blocks[0].mixer.complex_weight) in decayed


@pytest.mark.parametrize("name", KINDS)
def test_gradient_checkpointing_changes_no_gradient(name):
    model = create(name)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    gradients, runs = [], []
    for block in blocks:
        block.norm1.register_forward_hook(lambda *_: runs.append(model.grad_checkpointing))
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.eval()(images()).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert (runs.count(False), runs.count(True)) == (len(blocks), 2 * len(blocks))


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(96, 70), (50, 131)])
def test_input_size_can_be_changed_or_left_open(name, size):
    model = create(name, dynamic_img_size=True).eval()
    dynamic = model(images(*size))
    assert torch.isfinite(dynamic).all()
    model.set_input_size(size)
    assert torch.allclose(model(images(*size)), dynamic, atol=1e-5)
    model.load_state_dict(create(name, img_size=size).state_dict())

    fixed = create(name)
    fixed.set_input_size(size)
    assert get_model_input_config(fixed)["input_size"] == (3, *size)


@pytest.mark.parametrize("name", KINDS)
def test_images_of_another_size_are_refused_by_name_of_both_sizes(name):
    with pytest.raises(ValueError, match="64x64 pixels, not 64x96"):
        create(name)(images(64, 96))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_unknown_arguments_are_errors(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        create(name, no_such_argument=1)


@pytest.mark.parametrize("name", KINDS)
def test_other_channels_and_dropout(name):
    model = create(name, in_chans=5, drop_rate=0.9).train()
    assert model.in_chans == 5 and model.head_drop.p == 0.9
    assert model(images(channels=5)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_models_can_be_copied_and_pickled(name):
    model = create(name).eval()
    logits = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), logits)
    assert torch.equal(pickle.loads(pickle.dumps(model))(images()), logits)


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_and_double_change_no_result(name):
    model = create(name).eval()
    logits = model(images())
    model.to(memory_format=torch.channels_last)
    assert torch.allclose(model(images().to(memory_format=torch.channels_last)), logits, atol=1e-5)
    assert torch.allclose(model.double()(images().double()).float(), logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_models_compile_without_a_graph_break(name):
    shallow = {"depth": 2, "alpha": 1} if is_vanilla(name) else {"depths": (1, 1, 1, 1)}
    model = create(name, drop_path_rate=0.0, **shallow).train()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, dynamic=False, backend="eager")
    for step in (model, compiled):
        step(images()).square().sum().backward()
    for (parameter_name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-4 * max(a.grad.abs().max(), 1)), parameter_name


def test_compile_keeps_grids_from_being_laid_out_as_images(monkeypatch):
    model, given = create("spectformer_h_s"), {}
    monkeypatch.setattr(torch, "compile", lambda call, **arguments: given.update(arguments) or call)
    model.compile(fullgraph=True, options={"epilogue_fusion": True})
    assert given["options"] == {"layout_optimization": False, "epilogue_fusion": True} and given["fullgraph"]
    model.compile(mode="max-autotune-no-cudagraphs")
    assert given["mode"] is None and given["options"].items() >= {
        ("layout_optimization", False),
        ("max_autotune", True),
    }
    given.clear()
    model.compile(backend="eager")  # torch accepts no options for this backend
    assert given["options"] is None and given["backend"] == "eager"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectformer_h_s", "svt_s"])
def test_a_token_label_step_compiles_without_a_graph_break_once_for_all_boxes_in_a_tensor(name):
    model = create(name, token_label=True, depths=(1, 1, 1, 1), drop_path_rate=0.0).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="aot_eager")
    for corners in ((0, 0, 1, 2), (0, 0, 2, 1), (1, 0, 2, 2)):
        box = torch.tensor(corners)
        first = corners == (0, 0, 1, 2)
        with torch.compiler.set_stance("default" if first else "fail_on_recompile"):
            tokens = compiled(images(), box)[1]
        assert torch.allclose(tokens, model(images(), box)[1], atol=1e-5)
    tokens.square().mean().backward()
    assert all(weight.grad is not None for weight in model.stages.parameters())
