import inspect
import re

import pytest
import timm
import torch
from small_models import create, images, is_vanilla

from models import ARCHITECTURES, Pyramid, Vanilla, resolve_arch, sample_mix_box, set_spectral_precision, to_original
from models.base import ImageModel
from models.flops import count_flops, flops_by_kind
from models.mixers import MIXERS, Attention, ScatteringMixer, SpectralGate, build_mixer
from models.pyramid import stage_grids

TINY = {
    "img_size": 64,
    "num_classes": 5,
    "stem_width": 8,
    "embed_dims": (16, 32, 32, 64),
    "depths": (1, 1, 1, 1),
    "mlp_ratios": (2, 2, 2, 2),
}


NARROW = {"embed_dims": (16, 16, 16, 16), "stem_width": 8, "num_heads": (1, 1, 1, 1)}


def narrow(name, **arguments):
    """Create a narrow model with the full depth."""
    widths = {"embed_dim": 64} if is_vanilla(name) else NARROW
    return timm.create_model(name, **widths | {"img_size": 32} | arguments)


def parameters(name, **arguments):
    with torch.device("meta"):
        model = timm.create_model(name, **arguments)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("spectformer_ti", 9_158_376),
        ("spectformer_xs", 20_028_520),
        ("spectformer_s", 32_449_768),
        ("spectformer_b", 57_159_656),
    ],
)
def test_vanilla_models_have_the_published_parameters(name, count):
    assert parameters(name) == count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "with_head", "without"),
    [
        ("spectformer_h_s", 22_226_928, 21_777_928),
        ("spectformer_h_b", 33_052_880, 32_539_880),
        ("spectformer_h_l", 54_675_792, 54_162_792),
        ("svt_h_s", 22_052_592, 21_603_592),
        ("svt_h_b", 32_878_544, 32_365_544),
        ("svt_h_l", 54_594_000, 54_081_000),
    ],
)
def test_pyramids_have_the_published_parameters_with_both_heads(name, with_head, without):
    assert parameters(name, token_label=True) == with_head
    assert parameters(name) == without


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("svt_h_s", 22_015_728), ("svt_h_b", 32_841_680)])
def test_channel_token_mixing_has_the_published_parameters(name, count):
    assert parameters(name, token_label=True, mixing="channel_token") == count


@pytest.mark.slow
def test_aliases_are_the_same_models():
    shallow = {"depths": (1, 1, 1, 1)}
    for size in "sbl":
        assert parameters(f"svt_{size}", **shallow) == parameters(f"svt_h_{size}", **shallow)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "published", "kinds"),
    [
        ("spectformer_ti", 1.8, ("layers", "attention", "spectral")),
        ("spectformer_xs", 4.0, ("layers", "attention", "spectral")),
        ("spectformer_b", 11.5, ("layers", "attention", "spectral")),
        ("svt_vanilla_ti", 1.8, ("layers", "attention")),
        ("svt_vanilla_xs", 4.0, ("layers", "attention")),
        ("svt_vanilla_s", 6.6, ("layers", "attention")),
        ("svt_vanilla_b", 11.5, ("layers", "attention")),
        ("spectformer_h_s", 3.9, ("layers", "spectral")),
        ("spectformer_h_l", 12.7, ("layers", "spectral")),
    ],
)
def test_arithmetic_is_the_published_one(name, published, kinds):
    with torch.device("meta"):
        model = timm.create_model(name)
    counted = flops_by_kind(model, 224)
    assert sum(counted[kind] for kind in kinds) / 1e9 == pytest.approx(published, abs=0.07)
    assert count_flops(model, 224) == sum(counted.values())


@pytest.mark.slow
def test_published_arithmetic_of_svt_is_that_of_its_layers_for_alpha_2():
    with torch.device("meta"):
        model = timm.create_model("svt_h_s", spectral_depths=(3, 4, 0, 0))
    assert flops_by_kind(model, 224)["layers"] / 1e9 == pytest.approx(3.9, abs=0.05)


def test_papers_spellings_are_resolved():
    assert resolve_arch("spectformer-xs") == "spectformer_xs"
    assert resolve_arch("spectformer-t") == "spectformer_ti"
    assert resolve_arch("SpectFormer-H-S") == "spectformer_h_s"
    assert resolve_arch("svt-s") == "svt_s"
    assert resolve_arch("deit-small_patch16_224") == "deit_small_patch16_224"
    assert resolve_arch("hf-hub:timm/some-model") == "hf-hub:timm/some-model"
    assert all(resolve_arch(name) == name for name in ARCHITECTURES)


def test_the_tables_say_where_each_mixer_is():
    def kinds(name, **arguments):
        model = narrow(name, **arguments)
        stages = model.stages if isinstance(model, Pyramid) else [model]
        return [[type(block.mixer) for block in stage.blocks] for stage in stages]

    gate, scatter, attention = SpectralGate, ScatteringMixer, Attention
    assert kinds("spectformer_xs") == [[gate] * 4 + [attention] * 8]
    assert kinds("spectformer_xs", alpha=0) == [[attention] * 12]
    assert kinds("spectformer_h_s") == [[gate] * 3, [gate] * 4, [attention] * 6, [attention] * 3]
    assert kinds("spectformer_h_s", spectral_depths=(2, 3, 0, 0))[:2] == [
        [gate] * 2 + [attention],
        [gate] * 3 + [attention],
    ]
    assert kinds("svt_h_l") == [[scatter] * 3, [attention] * 6, [attention] * 18, [attention] * 3]
    assert kinds("svt_h_s", depths=(1, 1, 1, 1)) == [[scatter], [attention], [attention], [attention]]


@pytest.mark.parametrize("name", MIXERS)
@pytest.mark.parametrize("grid", [(8, 8), (7, 5)])
def test_every_mixer_keeps_the_grid_and_its_dtype(name, grid):
    torch.manual_seed(0)
    mixer = build_mixer(name, 16, grid, 2)
    x = torch.randn(2, *grid, 16)
    assert mixer(x).shape == x.shape
    assert mixer.double()(x.double()).dtype == torch.float64
    mixer.float()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = mixer(x)
    assert (mixed.float() - mixer(x)).abs().max() <= 0.02 * max(mixer(x).abs().max(), 0.1)


@pytest.mark.parametrize("name", ["spectral", *(name for name in MIXERS if name.startswith("scattering"))])
def test_spectral_mixers_take_another_grid_as_if_resized_to_it(name):
    torch.manual_seed(0)
    mixer = build_mixer(name, 16, (8, 6), 2)
    x = torch.randn(2, 11, 9, 16)
    on_the_fly = mixer(x)
    mixer.set_grid_size((11, 9))
    assert torch.allclose(mixer(x), on_the_fly, atol=1e-6)
    assert all(parameter.requires_grad for parameter in mixer.parameters())


def test_spectral_gate_is_untouched_by_autocast_with_float32_precision():
    gate = SpectralGate(8, (8, 8))
    set_spectral_precision(gate, "float32")
    x = torch.randn(1, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(x), gate(x.float()))
    assert gate(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("stem_stride", [4, 2, 1])
@pytest.mark.parametrize("size", [(224, 224), (225, 97), (33, 250), (32, 48)])
def test_stage_grids_are_those_of_the_convolutions(size, stem_stride):
    if stem_stride < 4:
        size = (size[0] // 4, size[1] // 4)
    model = timm.create_model("spectformer_h_s", **TINY | {"img_size": size, "stem_stride": stem_stride})
    shapes = [tuple(f.shape[2:]) for f in model.forward_intermediates(torch.zeros(2, 3, *size))[1]]
    assert shapes == stage_grids(size, 4, stem_stride)
    assert model.token_label_size == shapes[-1]


@pytest.mark.parametrize(("stem_stride", "strides"), [(4, (2, 2)), (2, (2, 1)), (1, (1, 1))])
def test_the_stems_stride_is_its_first_and_last_convolutions(stem_stride, strides):
    model = create("svt_h_s", stem_stride=stem_stride, img_size=32)
    assert (model.stem.conv[0].stride[0], model.stem.proj.stride[0]) == strides
    info = create("svt_h_s", stem_stride=stem_stride, img_size=32, features_only=True)
    assert info.feature_info.reduction() == [stem_stride * 2**i for i in range(4)]
    assert [32 // f.shape[2] for f in info(images(32, 32))] == info.feature_info.reduction()
    assert create("svt_h_s", img_size=64).state_dict().keys() == model.state_dict().keys()


def test_patches_may_have_another_size():
    model = create("spectformer_xs", patch_size=4, img_size=32)
    assert model.grid_size == (8, 8) and model.patch_embed.proj.kernel_size == model.patch_embed.proj.stride == (4, 4)
    assert {info["reduction"] for info in model.feature_info} == {4}
    assert model(images(32, 32)).shape == (2, 10)
    assert [f.shape[2] for f in create("spectformer_xs", patch_size=8, features_only=True)(images())] == [8, 8, 8]


FINE_GRIDS = {
    "spectformer_xs": {"patch_size": 4},
    "svt_vanilla_xs": {"patch_size": 4},
    "spectformer_h_s": {"stem_stride": 2},
    "svt_h_s": {"stem_stride": 1, "mixing": "token"},
}


@pytest.mark.parametrize(("name", "fine"), FINE_GRIDS.items())
def test_models_of_fine_grids_are_resized_and_loaded_as_others(name, fine, tmp_path):
    model = create(name, img_size=32, dynamic_img_size=True, **fine).eval()
    torch.save({"model": to_original(model.state_dict())}, tmp_path / "authors.pth")
    overlay = {"file": str(tmp_path / "authors.pth"), "num_classes": 10}
    larger = create(name, img_size=(40, 24), pretrained=True, pretrained_cfg_overlay=overlay, **fine).eval()
    x = images(40, 24)
    assert torch.allclose(larger(x), model(x), atol=1e-5)
    model.set_input_size((40, 24))
    for weights in (model.state_dict().items(), larger.state_dict().items()):
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in weights)


def test_the_mixed_box_is_eight_times_as_large_on_the_stems_grid_whatever_its_stride():
    model = create("svt_h_s", token_label=True, stem_stride=2, img_size=(32, 48), drop_path_rate=0.0).train()
    assert model.token_label_size == (2, 3)
    seen = []
    model.stages[0].blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for box in ((0, 0, 0, 0), (1, 0, 3, 1)):
        logits, token_logits, _ = model(images(32, 48), box)
    assert logits.shape == (2, 10) and token_logits.shape == (2, 6, 10)
    changed = (seen[0] != seen[-1]).any(-1)[0]
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[0:8, 8:24] = True
    assert torch.equal(changed, expected)


def test_weights_start_as_specified():
    torch.manual_seed(0)
    model = timm.create_model("svt_h_s", mixing="channel_token", token_label=True, depths=(1, 1, 1, 1))
    mixer = model.stages[0].blocks[0].mixer
    for weight, std in [
        (model.head.weight, 0.02),
        (model.aux_head.weight, 0.02),
        (model.stages[2].blocks[0].mixer.qkv.weight, 0.02),
        (mixer.low_pass, 0.02),
        (mixer.token_blend.weight1, 0.02),
        (model.stages[1].downsample.proj.weight, (2 / (9 * 128)) ** 0.5),
        (model.stages[0].blocks[0].mlp.dwconv.weight, (2 / 9) ** 0.5),
    ]:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    assert not any(model.get_parameter(f"{name}.bias").any() for name in ("head", "stem.proj", "aux_head"))
    vanilla = timm.create_model("spectformer_ti", depth=4)
    assert vanilla.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
    assert vanilla.blocks[0].mixer.complex_weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_drop_path_grows_linearly_over_all_blocks():
    model = narrow("svt_h_s", drop_path_rate=0.3)
    blocks = [block for stage in model.stages for block in stage.blocks]
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.3 * i / 15 for i in range(16)], abs=1e-6)


@pytest.mark.parametrize(
    ("name", "rate"),
    [("spectformer_ti", 0), ("spectformer_s", 0.15), ("spectformer_b", 0.25), ("svt_b", 0.1), ("svt_l", 0.3)],
)
def test_drop_path_defaults(name, rate):
    model = narrow(name)
    last = model.stages[-1].blocks[-1] if isinstance(model, Pyramid) else model.blocks[-1]
    assert getattr(last.drop_path, "drop_prob", 0.0) == pytest.approx(rate)


@pytest.fixture
def token_labeller():
    torch.manual_seed(0)
    arguments = TINY | {"img_size": (64, 96), "drop_path_rate": 0.0}
    model = timm.create_model("svt_s", token_label=True, **arguments).train()
    for module in model.modules():  # so that each output only depends on its own sample
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_training_with_token_labels_returns_both_logits_and_the_box(token_labeller):
    x = torch.randn(4, 3, 64, 96)
    logits, token_logits, box = token_labeller(x, (0, 1, 2, 2))
    assert logits.shape == (4, 5) and token_logits.shape == (4, 2 * 3, 5) and box == (0, 1, 2, 2)
    torch.manual_seed(3)
    drawn = token_labeller(x)[2]
    torch.manual_seed(3)
    assert drawn == sample_mix_box((2, 3))


def test_a_box_of_everything_is_the_flipped_batch_swapped_back(token_labeller):
    x = torch.randn(3, 3, 64, 96)
    logits, token_logits, _ = token_labeller(x, (0, 0, 3, 2))
    plain, plain_tokens, _ = token_labeller(x, (1, 1, 1, 1))
    assert torch.allclose(logits, plain.flip(0), atol=1e-5)
    assert torch.allclose(token_logits, plain_tokens, atol=1e-5)


def test_the_box_is_x_along_the_width_and_y_along_the_height(token_labeller):
    seen = []
    token_labeller.stages[0].blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.randn(2, 3, 64, 96)
    token_labeller(x, (0, 0, 0, 0))
    token_labeller(x, (1, 0, 3, 1))
    changed = (seen[0] != seen[-1]).any(-1)[0]
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[0:8, 8:24] = True
    assert torch.equal(changed, expected)


def test_evaluation_adds_half_of_the_best_token(token_labeller):
    model = token_labeller.eval()
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    expected = model.head(features[:, 0]) + 0.5 * model.aux_head(features[:, 1:]).max(1).values
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_boxes_are_within_the_grid_and_cover_half_of_it_less_clipping():
    torch.manual_seed(0)
    areas = []
    for _ in range(2000):
        x1, y1, x2, y2 = sample_mix_box((28, 14))
        assert 0 <= x1 <= x2 <= 14 and 0 <= y1 <= y2 <= 28
        areas.append((x2 - x1) * (y2 - y1) / (28 * 14))
    # Sides are sqrt(1 - lambda), lambda uniform. The mean area is 1/2 unclipped, E[(s - s^2 / 4)^2] = 0.30 clipped.
    assert sum(areas) / len(areas) == pytest.approx(0.30, abs=0.04)
    assert min(areas) == 0 and max(areas) > 0.75


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": "spectformer_ti", "alpha": 13},
        {"name": "spectformer_ti", "num_heads": 6},
        {"name": "spectformer_ti", "num_heads": -1},
        {"name": "spectformer_ti", "img_size": 15},
        {"name": "spectformer_ti", "patch_size": 0},
        {"name": "spectformer_ti", "patch_size": 4, "img_size": 3},
        {"name": "svt_s", "stem_stride": 3},
        {"name": "svt_s", "stem_stride": 8},
        {"name": "spectformer_ti", "img_size": (224, 224, 3)},
        {"name": "spectformer_ti", "global_pool": "token"},
        {"name": "svt_s", "mixing": "tokens"},
        {"name": "svt_s", "embed_dims": (66, 128, 320, 448)},
        {"name": "svt_s", "spectral_depths": (4, 0, 0, 0)},
        {"name": "svt_s", "depths": (3, 4, 6)},
        {"name": "spectformer_h_s", "mixer": "wavelets"},
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(arguments):
    arguments = dict(arguments)
    with pytest.raises(ValueError):
        timm.create_model(arguments.pop("name"), **arguments)


@pytest.mark.parametrize("body", [Pyramid, Vanilla], ids=lambda body: body.__name__)
def test_help_says_what_each_argument_and_method_is(body):
    names = [re.findall(r"^    (\w+): ", inspect.getdoc(described), re.M) for described in (body, ImageModel)]
    assert {*inspect.signature(body).parameters, "ValueError"} == {*names[0], *names[1]}
    methods = {name: value for name, value in vars(body).items() if callable(value) and not name.startswith("_")}
    assert [name for name, method in methods.items() if not method.__doc__] == []
