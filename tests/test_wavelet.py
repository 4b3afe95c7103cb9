import sys

import pytest
import timm
import torch
from pytorch_wavelets import DTCWTForward, DTCWTInverse
from torch import nn

from models import scattering
from models.blending import EinsteinBlending
from models.library_wavelet import library_transforms
from models.scattering import ScatteringMixer
from models.wavelet import analyse, padded_grid, synthesise


def grid_of(height, width, channels=2, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, height, width, channels, generator=generator, dtype=dtype)


@pytest.mark.slow
def test_transform_is_that_of_pytorch_wavelets_for_every_even_size():
    forward = DTCWTForward(J=1, biort="near_sym_b", qshift="qshift_b")
    inverse = DTCWTInverse(biort="near_sym_b", qshift="qshift_b")
    for height in range(8, 66, 2):
        grid = (height, 74 - height)
        x = grid_of(*grid)
        low, bands = analyse(x)
        library_low, (library_bands,) = forward(x.permute(0, 3, 1, 2))  # (B, C, H, W), (B, C, 6, H / 2, W / 2, 2)
        assert (low - library_low.permute(0, 2, 3, 1)).abs().max() <= 1e-5, grid
        assert (bands - library_bands.permute(0, 3, 4, 2, 5, 1)).abs().max() <= 1e-5, grid
        weight = torch.randn(library_bands.shape, generator=torch.Generator().manual_seed(1))
        back = synthesise(low, bands * weight.permute(0, 3, 4, 2, 5, 1), grid)
        library_back = inverse((library_low, [library_bands * weight]))
        assert (back - library_back.permute(0, 2, 3, 1)).abs().max() <= 1e-5, grid


def test_the_library_is_needed_only_by_its_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_wavelets", None)  # as if it were not installed
    library_transforms.cache_clear()
    assert ScatteringMixer(8, (4, 4))(grid_of(4, 4, channels=8)).shape == (1, 4, 4, 8)
    with pytest.raises(ImportError, match="pytorch_wavelets"):
        timm.create_model("svt_h_n", wavelet_backend="pytorch_wavelets")


@pytest.mark.slow
def test_models_with_either_wavelet_backend_agree(monkeypatch):
    torch.manual_seed(0)
    native = timm.create_model("svt_h_n", num_classes=10).eval()
    library = timm.create_model("svt_h_n", num_classes=10, wavelet_backend="pytorch_wavelets").eval()
    library.load_state_dict(native.state_dict())
    images = torch.randn(2, 3, 32, 32)
    expected = native(images)
    monkeypatch.setattr(scattering, "analyse", None)  # neither it nor the CPU kernel runs in place of the library
    monkeypatch.setattr(scattering, "scatter", None)
    assert (library(images) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("grid", [(25, 31), (7, 7), (8, 9), (57, 56), (1, 3), (121, 119)])
def test_odd_sizes_are_reconstructed(grid):
    x = grid_of(*grid)
    low, bands = analyse(x)
    assert low.shape[1:3] == padded_grid(grid)
    assert (synthesise(low, bands, grid) - x).abs().max() <= 1e-5


def test_float64_stays_exact_whatever_the_modules_precision():
    x = grid_of(14, 9, dtype=torch.float64)
    low, bands = analyse(x)
    assert low.dtype == bands.dtype == torch.float64
    assert (synthesise(low, bands, (14, 9)) - x).abs().max() <= 1e-12


@pytest.mark.slow
def test_transform_and_inverse_have_the_right_gradients():
    x = grid_of(5, 6, channels=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(analyse, x)
    parts = tuple(part.detach().requires_grad_() for part in analyse(x))
    assert torch.autograd.gradcheck(lambda low, bands: synthesise(low, bands, (5, 6)), parts)


def test_bfloat16_autocast_does_not_reach_the_transform():
    x = grid_of(28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        assert (synthesise(*analyse(x), (28, 28)) - x).abs().max() <= 1e-5


def test_half_precision_input_comes_back_in_half_precision():
    x = grid_of(8, 8).bfloat16()
    low, bands = analyse(x)
    assert low.dtype == bands.dtype == torch.bfloat16
    exact, _ = analyse(x.float())
    assert (low.float() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("size", [9, 14, 130])
def test_transform_compiles_without_a_graph_break(size):
    def round_trip(x):
        low, bands = analyse(x)
        return synthesise(2 * low, 2 * bands, (size, size))

    x = grid_of(size, size, channels=1)
    compiled = torch.compile(round_trip, fullgraph=True, dynamic=False, backend="aot_eager")
    assert (compiled(x) - 2 * x).abs().max() <= 1e-5


def complex_relu(z):
    return torch.complex(z.real.relu(), z.imag.relu())


def as_complex(pair):
    return torch.complex(pair[0], pair[1])


@pytest.mark.parametrize("over", ["channels", "tokens"])
def test_einstein_blending_is_complex_arithmetic(over):
    torch.manual_seed(0)
    blocks, size = (4, 3) if over == "channels" else (5, 7)
    blend = EinsteinBlending(blocks, size, over)
    for parameter in blend.parameters():
        nn.init.normal_(parameter)
    bands = torch.randn(2, 5, 7, 6, 2, 12)
    w1, b1, w2, b2 = (as_complex(p) for p in (blend.weight1, blend.bias1, blend.weight2, blend.bias2))
    z = as_complex(bands.unbind(-2))
    z = z.unflatten(-1, (4, 3)) if over == "channels" else z.permute(0, 3, 4, 1, 2)
    # channels: (..., block, place); tokens: (..., channel, row, position)
    z = torch.einsum("...bd,bdk->...bk", complex_relu(torch.einsum("...bd,bdk->...bk", z, w1) + b1), w2) + b2
    z = z.flatten(-2) if over == "channels" else z.permute(0, 3, 4, 1, 2)
    assert torch.allclose(as_complex(blend(bands).unbind(-2)), z, atol=1e-4)


def test_token_weights_of_another_grid_keep_the_size_of_their_sums():
    weight = ScatteringMixer.resize_weight("token_blend.weight1", torch.full((2, 4, 6, 6), 0.5), (11, 20))
    assert weight.shape == (2, 6, 10, 10)
    assert torch.allclose(weight.sum(2), torch.tensor(0.5 * 6))
    bias = ScatteringMixer.resize_weight("token_blend.bias1", torch.ones(2, 4, 6), (11, 20))
    assert torch.allclose(bias, torch.ones(2, 6, 10))
