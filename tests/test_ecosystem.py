"""What other libraries do with a model: building it on the meta device, segmenting with it, quantising it."""

import json
import warnings

import pytest
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import timm.data
import torch
from small_models import KINDS, PYRAMID, create, images, is_vanilla
from timm.layers import set_fused_attn
from timm.models import save_for_hf
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.utils import AttentionExtract
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import TimmWrapperForImageClassification

from models.layers import Attention, ClassAttention


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_transformers_wrapper_gives_the_same_logits(name, tmp_path):
    model = create(name).eval()
    save_for_hf(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]["num_classes"]  # transformers passes it a second time, for timm's own models too
    (tmp_path / "config.json").write_text(json.dumps(config))
    wrapper = TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(wrapper(pixel_values=images()).logits, model(images()))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in KINDS if not is_vanilla(name)])
def test_a_segmentation_model_over_a_pyramid_takes_images_of_any_size_by_default(name):
    unet = smp.Unet(f"tu-{name}", encoder_weights=None, classes=3, **PYRAMID).eval()
    for height, width in ((64, 96), (160, 64)):
        assert unet(images(height, width)).shape == (2, 3, height, width)


@pytest.mark.parametrize("name", ["spectformer_h_n", "svt_h_n"])
def test_a_segmentation_model_over_a_small_pyramid_takes_four_levels(name):
    levels = {"encoder_depth": 4, "decoder_channels": (128, 64, 32, 16)}  # as docs/use.md says
    unet = smp.Unet(f"tu-{name}", encoder_weights=None, classes=3, **levels).eval()
    assert unet(images(64, 32)).shape == (2, 3, 64, 32)


@pytest.mark.parametrize("how", [{"method": "hook"}, {"method": "fx", "names": ["*.softmax"]}], ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_timm_extracts_attention_maps_of_models_built_without_fused_attention(name, how):
    fused = create(name).eval()
    set_fused_attn(False)
    try:
        model = create(name).eval()
    finally:
        set_fused_attn(True)
    assert torch.allclose(model(images()), fused(images()), atol=1e-5)
    maps = AttentionExtract(model, **how)(images())
    assert len(maps) == sum(isinstance(module, (Attention, ClassAttention)) for module in model.modules())
    assert all(torch.allclose(attention.sum(-1), torch.ones(1), atol=1e-5) for attention in maps.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_a_dense_prediction_transformer_reads_grids_and_class_tokens(name):
    readout = {"decoder_readout": "ignore"} if is_vanilla(name) else {}  # by default it wants a class token
    small = {"embed_dim": 64} if is_vanilla(name) else PYRAMID  # smp passes its own depth
    dense = smp.DPT(f"tu-{name}", encoder_weights=None, classes=3, img_size=64, **readout, **small).eval()
    assert dense(images()).shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", [name for name in KINDS if not is_vanilla(name)])
def test_the_class_token_beside_the_last_grid_is_what_the_classifier_reads(name):
    model = create(name).eval()
    pairs = model.forward_intermediates(images(), norm=True, intermediates_only=True, return_prefix_tokens=True)
    grids, tokens = zip(*pairs, strict=True)
    assert [(grid.shape[1], token.shape) for grid, token in pairs] == [(c, (2, 1, c)) for c in PYRAMID["embed_dims"]]
    assert torch.allclose(tokens[0][:, 0], grids[0].mean((2, 3)), atol=1e-6)
    assert torch.allclose(model.head(tokens[-1][:, 0]), model(images()), atol=1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_timms_scripts_build_and_load_it(name, tmp_path):
    """The calls of timm's train.py, validate.py and benchmark.py: most of their arguments are None."""
    expected = create(name).eval()
    safetensors.torch.save_model(expected, str(tmp_path / "w.safetensors"))
    nothing = dict.fromkeys(["drop_path_rate", "drop_block_rate", "global_pool", "bn_momentum", "bn_eps"])
    given = {"in_chans": 3, "drop_rate": 0.0, "scriptable": False, "checkpoint_path": str(tmp_path / "w.safetensors")}
    model = create(name, pretrained=False, **nothing, **given).eval()
    assert torch.equal(model(images()), expected(images()))
    config = timm.data.resolve_data_config({"img_size": 64}, model=model, use_test_size=True)
    assert config["input_size"] == (3, 64, 64) and config["interpolation"] == "bicubic"


def filled_by_hand(model):
    """Every tensor replaced by one of no numbers, without the model's knowledge, as transformers does."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_floating_point():
                    filled = torch.full_like(tensor, torch.nan, device="cpu")
                    tensors[name] = nn.Parameter(filled) if tensors is module._parameters else filled
                elif tensor is not None:
                    tensors[name] = torch.zeros_like(tensor, device="cpu")
    reinit_non_persistent_buffers(model)
    return model


@pytest.mark.parametrize("materialised", [filled_by_hand, lambda model: model.to_empty(device="cpu")])
@pytest.mark.parametrize("name", KINDS)
def test_a_model_built_on_meta_computes_what_its_weights_say(name, materialised):
    model = create(name).eval()
    with torch.device("meta"):
        empty = create(name).eval()
    loaded = materialised(empty)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(images()), model(images()))


def dynamic(model):
    with warnings.catch_warnings(action="ignore"):  # deprecated, and still much in use
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8, inplace=True)


def int8(config):
    def quantise(model):
        quantize_(model, config())
        return model

    return quantise


QUANTISERS = {
    "torch.ao dynamic": dynamic,
    "torchao int8 weights": int8(Int8WeightOnlyConfig),
    "torchao int8 weights and activations": int8(Int8DynamicActivationInt8WeightConfig),
}


@pytest.mark.parametrize("quantise", QUANTISERS.values(), ids=QUANTISERS)
@pytest.mark.parametrize("name", KINDS)
def test_quantised_models_are_close_to_themselves(name, quantise):
    model = create(name).eval()
    with torch.no_grad():
        logits = model(images())
        mlp = next(module for module in model.modules() if hasattr(module, "fc1"))
        plain = mlp.fc1.weight
        quantised = quantise(model)(images())
    assert 0 < (quantised - logits).norm() <= 0.05 * logits.norm()
    assert mlp.fc1.weight is not plain
