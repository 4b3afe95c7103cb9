import pytest
import timm
import torch
import torch.nn.functional as F
from small_models import create, images, is_vanilla
from torch import nn

from models import ARCHITECTURES
from models.mixers import MIXERS, Attention, ScatteringMixer, SpectralGate, block_mixers, build_mixer, stage_mixers
from models.other_mixers import AFNO, AveragePooling, DepthwiseConv, FNet, FourierOperator
from models.wavelet import analyse, synthesise

# Parameters of SVT-H-S with two spectral stages and a token-label head: 21,173,232 plus those of the mixers in the
# seven spectral blocks. The comments give the paper's name and its number of parameters in millions.
PUBLISHED = {
    "fnet": 21_173_232,  # FN 21.17
    "fno": 21_330_288,  # FNO 21.33
    "spectral": 22_226_928,  # FGN 22.2
    "scattering_channel": 22_257_392,  # TTXE 22.25
    "scattering_token_half": 21_998_384,  # TTEX 21.99
    "scattering_channel_token": 22_019_248,  # TTEE 22.01
    "scattering_tensor": 25_187_312,  # TTTT 25.18
}
UNPUBLISHED = {
    "none": 21_173_232,
    "pool": 21_173_232,
    "conv": 21_173_232 + 10 * (3 * 64 + 4 * 128),
    "afno": 21_173_232 + 3 * 4 * (64 * 8 + 64) + 4 * 4 * (128 * 16 + 128),
    "attention": 21_173_232 + 3 * (4 * 64**2 + 4 * 64) + 4 * (4 * 128**2 + 4 * 128),
}


@pytest.mark.parametrize(("mixer", "count"), [*PUBLISHED.items(), *UNPUBLISHED.items()])
def test_mixers_have_exactly_the_papers_parameters(mixer, count):
    with torch.device("meta"):
        model = timm.create_model("svt_h_s", mixer=mixer, spectral_depths=(3, 4, 0, 0), token_label=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("svt_vanilla_ti", 9_108_328),  # published: 9 M
        ("svt_vanilla_xs", 19_999_464),  # 19.9 M
        ("svt_vanilla_s", 32_420_712),  # 32.2 M, unexplained
        ("svt_vanilla_b", 57_184_360),  # 57.6 M, unexplained
    ],
)
def test_vanilla_svt_has_the_parameters_of_its_published_body(name, count):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == count


def grid(height=6, width=5, channels=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, height, width, channels, generator=generator, dtype=dtype)


def strong(mixer):
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixer.double()


def as_complex(pair):
    return torch.complex(pair[0], pair[1])


def test_fnet_is_the_real_part_of_the_transform():
    x = grid()
    assert torch.allclose(FNet()(x), torch.fft.fft2(x, dim=(1, 2), norm="ortho").real)
    assert torch.allclose(FNet(channels=True)(x), torch.fft.fftn(x, dim=(1, 2, 3), norm="ortho").real)


def test_fourier_operator_is_one_complex_layer_for_all_frequencies():
    mixer, x = strong(FourierOperator(16)), grid()
    z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
    z = z @ as_complex(mixer.weight) + as_complex(mixer.bias)
    assert torch.allclose(mixer(x), torch.fft.irfft2(z, s=(6, 5), dim=(1, 2), norm="ortho"))


def test_afno_is_two_complex_layers_in_blocks_shrunk():
    mixer, x = strong(AFNO(16, blocks=4, shrinkage=0.3)), grid()
    weight1, bias1, weight2, bias2 = (
        as_complex(parameter) for parameter in (mixer.mlp.weight1, mixer.mlp.bias1, mixer.mlp.weight2, mixer.mlp.bias2)
    )
    z = torch.fft.rfft2(x, dim=(1, 2), norm="ortho").unflatten(-1, (4, 4))
    z = torch.einsum("...bd,bdk->...bk", z, weight1) + bias1
    z = torch.einsum("...bd,bdk->...bk", torch.complex(z.real.relu(), z.imag.relu()), weight2) + bias2
    z = torch.complex(F.softshrink(z.real, 0.3), F.softshrink(z.imag, 0.3)).flatten(-2)
    assert torch.allclose(mixer(x), x + torch.fft.irfft2(z, s=(6, 5), dim=(1, 2), norm="ortho"))


def test_tensor_blending_multiplies_each_coefficient_by_its_own_weight():
    mixer, x = strong(ScatteringMixer(8, (6, 4), "tensor")), grid(6, 4, 8)
    low, bands = analyse(x)
    assert mixer.tensor_blend.weight.shape == (12, 3, 2, 8)
    real, imaginary = mixer.tensor_blend.weight.permute(1, 2, 0, 3).chunk(2, 2)
    blended = torch.stack((bands[..., 0, :] * real, bands[..., 1, :] * imaginary), -2)
    expected = synthesise(low * mixer.low_pass, blended, (6, 4))
    assert torch.allclose(mixer(x), expected)


def test_token_half_is_a_convolution_and_token_blending_interleaved():
    mixer, x = strong(ScatteringMixer(8, (6, 4), "token_half")), grid(6, 4, 8)
    token = strong(ScatteringMixer(4, (6, 4), "token"))
    token.load_state_dict({name: weight for name, weight in mixer.state_dict().items() if "conv" not in name})
    y = mixer(x)
    assert torch.allclose(y[..., 0::2], mixer.conv(x[..., :4].permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    assert torch.allclose(y[..., 1::2], token(x[..., 4:]))


def test_local_mixers_see_the_neighbours_alone():
    x = torch.zeros(1, 7, 7, 2, dtype=torch.float64)
    x[0, 3, 3] = 1
    near = torch.zeros(7, 7, dtype=torch.bool)
    near[2:5, 2:5] = True
    for mixer in (DepthwiseConv(2).double(), AveragePooling()):
        response = mixer(x) - mixer(torch.zeros_like(x))
        assert torch.equal(response.abs().sum((0, 3)) > 0, near)
    assert AveragePooling()(torch.ones(1, 5, 5, 2)).abs().max() <= 1e-6  # also at the border


@pytest.mark.parametrize("name", MIXERS)
def test_channels_last_changes_no_result(name):
    mixer, x = strong(build_mixer(name, 16, (6, 5), 2)), grid()
    y = mixer(x)
    assert torch.allclose(mixer.to(memory_format=torch.channels_last)(x), y)


@pytest.mark.parametrize("name", MIXERS)
def test_gradients_of_every_mixer_are_right_on_an_odd_grid_that_is_not_square(name):
    torch.manual_seed(0)
    mixer, x = strong(build_mixer(name, 8, (5, 4), 2)), grid(5, 4, 8)[:1].requires_grad_()
    assert torch.autograd.gradcheck(mixer, x, fast_mode=True)


KINDS = {
    "attention": Attention,
    "spectral": SpectralGate,
    "fnet": FNet,
    "scattering_channel": ScatteringMixer,
    "none": nn.Identity,
}


def mixers_of(model):
    stages = model.stages if hasattr(model, "stages") else [model]
    return [[type(block.mixer) for block in stage.blocks] for stage in stages]


@pytest.mark.parametrize(
    "mixers",
    [
        "attention,fnet,spectral*2,none",
        " attention , fnet, spectral * 2,none",
        ["attention", "fnet", "spectral", "spectral", "none"],
        ("attention", "fnet", "spectral*2", "none"),
    ],
)
def test_each_block_of_a_vanilla_model_has_the_mixer_it_is_given(mixers):
    model = create("spectformer_xs", mixers=mixers)
    assert mixers_of(model) == [[KINDS[name] for name in ("attention", "fnet", "spectral", "spectral", "none")]]
    assert model(images()).shape == (2, 10)


@pytest.mark.parametrize(
    "mixers",
    [
        "scattering_channel/fnet/attention,spectral/none",
        ["scattering_channel", "fnet", "attention,spectral", "none"],
        [["scattering_channel"], ["fnet"], ["attention", "spectral"], ["none"]],
    ],
)
@pytest.mark.parametrize("name", ["spectformer_h_s", "svt_h_s"])
def test_each_block_of_a_pyramid_has_the_mixer_it_is_given(name, mixers):
    names = [["scattering_channel"], ["fnet"], ["attention", "spectral"], ["none"]]
    model = create(name, mixers=mixers)
    assert mixers_of(model) == [[KINDS[name] for name in stage] for stage in names]
    assert model(images()).shape == (2, 10)


def test_the_papers_choices_are_short_forms():
    def weights(**arguments):
        return create("spectformer_xs", **arguments).state_dict()

    short = weights(alpha=2)
    assert all(torch.equal(short[name], value) for name, value in weights(mixers="spectral*2,attention*3").items())
    assert weights(alpha=2, mixer="fno").keys() == weights(mixers="fno*2,attention*3").keys()
    assert weights(alpha=0).keys() == weights(mixers="attention*5").keys()
    assert (
        create("svt_h_s", mixing="token").state_dict().keys()
        == create("svt_h_s", mixers="scattering_token/attention/attention*2/attention").state_dict().keys()
    )


def test_only_attention_has_two_residuals_in_a_vanilla_model():
    model = create("spectformer_xs", mixers="attention,none,pool,conv,afno", drop_path_rate=0.0)
    for block in model.blocks:  # with a zero MLP, only two residual connections keep the mixer's output
        nn.init.zeros_(block.mlp.fc2.weight)
        nn.init.zeros_(block.mlp.fc2.bias)
    x = grid(4, 4, 64, torch.float32)
    assert [torch.equal(block(x), x) for block in model.blocks] == [False, True, True, True, True]


def test_options_reach_the_mixers_of_their_name():
    options = {"fnet": {"channels": True}, "conv": {"kernel_size": 5}}
    model = create("spectformer_xs", mixers="fnet,conv,attention*3", mixer_options=options)
    assert model.blocks[0].mixer.axes == (1, 2, 3)
    assert model.blocks[1].mixer.conv.kernel_size == (5, 5)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("spectformer_xs", {"mixers": "spectral*2,atention*3"}, "no mixer is called 'atention'; choose from attention"),
        ("spectformer_xs", {"mixers": "spectral*2,attention*2"}, "name 4 blocks, but there are 5"),
        ("spectformer_xs", {"mixers": "spectral*two,attention*3"}, "neither NAME nor NAME"),
        ("spectformer_xs", {"mixers": "spectral*-1,attention*6"}, "neither NAME nor NAME"),
        ("spectformer_xs", {"mixers": "spectral/attention*4"}, "no mixer is called 'spectral/attention'"),
        ("spectformer_xs", {"mixers": ""}, "no mixer is called ''"),
        ("spectformer_xs", {"mixers": 5}, "a list of names"),
        ("spectformer_xs", {"mixers": [4, 1]}, "a list of names"),
        ("spectformer_xs", {"mixers": "attention*5", "alpha": 2}, "mixers sets every block's mixer"),
        ("spectformer_xs", {"mixer": "gate"}, "no mixer is called 'gate'"),
        ("spectformer_xs", {"mixer_options": {"gate": {}}}, "no mixer is called 'gate'"),
        ("spectformer_xs", {"mixer": "afno", "embed_dim": 60, "num_heads": 1}, "a multiple of 8 channels, not 60"),
        ("svt_h_s", {"mixers": "attention*5"}, "4 lists, one per stage"),
        ("svt_h_s", {"mixers": "spectral/spectral/attention/attention"}, "name 1 blocks, but there are 2"),
        ("svt_h_s", {"mixers": 4}, "4 lists, one per stage"),
        ("svt_h_s", {"mixers": ["fnet", "fnet", 3, "fnet"]}, "a list of names"),
        (
            "svt_h_s",
            {"mixers": "none/none/none*2/none", "spectral_depths": (1, 0, 0, 0)},
            "mixers sets every block's mixer",
        ),
        ("svt_h_s", {"mixers": "none/none/none*2/none", "mixing": "token"}, "mixers sets every block's mixer"),
        ("svt_vanilla_xs", {"mixing": "tokens"}, "no mixer is called 'scattering_tokens'"),
    ],
    ids=str,
)
def test_mixers_that_make_no_sense_are_refused_in_one_line(name, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        create(name, **arguments)
    assert "\n" not in str(error.value)


def test_texts_and_lists_are_read_alike():
    assert block_mixers("fnet*2,pool", 3) == block_mixers(["fnet", "fnet", "pool"], 3) == ["fnet", "fnet", "pool"]
    assert (
        stage_mixers("fnet*2/pool", (2, 1))
        == stage_mixers([["fnet"] * 2, "pool"], (2, 1))
        == [
            ["fnet", "fnet"],
            ["pool"],
        ]
    )


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name.endswith(("_xs", "_h_s"))])
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_mixer_stands_in_every_body_at_any_size(name, mixer):
    one = {"depth": 2, "alpha": 1} if is_vanilla(name) else {"depths": (1, 1, 1, 1), "spectral_depths": (1, 1, 0, 0)}
    model = create(name, mixer=mixer, dynamic_img_size=True, **one).eval()
    dynamic = model(images(80, 50))
    model.set_input_size((80, 50))
    assert torch.allclose(model(images(80, 50)), dynamic, atol=1e-5)
    model.load_state_dict(create(name, mixer=mixer, img_size=(80, 50), **one).state_dict())
