import sys

import pytest
import timm
import torch
from torch import nn

from models import wavelet
from models.blending import EinsteinBlending
from models.scattering import ScatteringMixer
from models.wavelet import DTCWT, LibraryDTCWT


def grid_of(height, width, channels=2, batch=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, height, width, channels, generator=generator, dtype=dtype)


@pytest.mark.slow
def test_transform_is_that_of_pytorch_wavelets_for_every_even_size():
    ours, library = DTCWT(), LibraryDTCWT()
    for height in range(8, 66, 2):
        grid = (height, 74 - height)
        x = grid_of(*grid)
        for mine, theirs in zip(ours(x), library(x), strict=True):
            assert (mine - theirs).abs().max() <= 1e-5, grid
        low, high = library(x)
        weight = torch.randn(high.shape, generator=torch.Generator().manual_seed(1))
        difference = ours.inverse(low, high * weight, grid) - library.inverse(low, high * weight, grid)
        assert difference.abs().max() <= 1e-5, grid


def test_the_library_is_needed_only_by_its_backend(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_wavelets", None)  # as if it were not installed
    wavelet._library_transforms.cache_clear()
    assert ScatteringMixer(8, (4, 4))(grid_of(4, 4, channels=8)).shape == (1, 4, 4, 8)
    with pytest.raises(ImportError, match="pytorch_wavelets"):
        timm.create_model("svt_h_n", wavelet_backend="pytorch_wavelets")


@pytest.mark.slow
def test_models_with_either_wavelet_backend_agree():
    torch.manual_seed(0)
    native = timm.create_model("svt_h_n", num_classes=10, wavelet_backend="native").eval()
    library = timm.create_model("svt_h_n", num_classes=10, wavelet_backend="pytorch_wavelets").eval()
    library.load_state_dict(native.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert isinstance(library.stages[0].blocks[0].mixer.wavelet, LibraryDTCWT)
    assert (native(images) - library(images)).abs().max() <= 1e-4


def test_the_cpu_kernel_does_not_run_in_place_of_the_library(monkeypatch):
    transform, called = LibraryDTCWT.forward, []
    monkeypatch.setattr(LibraryDTCWT, "forward", lambda self, x: called.append(x) or transform(self, x))
    ScatteringMixer(8, (4, 4), "channel", backend="pytorch_wavelets")(grid_of(4, 4, channels=8))
    assert called


@pytest.mark.parametrize("grid", [(25, 31), (7, 7), (8, 9), (57, 56), (1, 3), (121, 119)])
def test_odd_sizes_are_reconstructed(grid):
    x = grid_of(*grid)
    transform = DTCWT()
    low, high = transform(x)
    assert low.shape[1:3] == wavelet.padded_grid(grid)
    assert (transform.inverse(low, high, grid) - x).abs().max() <= 1e-5


def test_float64_stays_exact_whatever_the_modules_precision():
    x = grid_of(14, 9, dtype=torch.float64)
    transform = DTCWT()
    low, high = transform(x)
    assert low.dtype == high.dtype == torch.float64
    assert (transform.inverse(low, high, (14, 9)) - x).abs().max() <= 1e-12


@pytest.mark.slow
def test_transform_and_inverse_have_the_right_gradients():
    transform = DTCWT()
    x = grid_of(5, 6, channels=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(transform, x)
    low, high = (part.detach().requires_grad_() for part in transform(x))
    assert torch.autograd.gradcheck(lambda *parts: transform.inverse(*parts, (5, 6)), (low, high))


def test_bfloat16_autocast_does_not_reach_the_transform():
    transform = DTCWT()
    x = grid_of(28, 28)
    with torch.autocast("cpu", torch.bfloat16):
        assert (transform.inverse(*transform(x), (28, 28)) - x).abs().max() <= 1e-5


def test_half_precision_input_comes_back_in_half_precision():
    x = grid_of(8, 8).bfloat16()
    low, high = DTCWT()(x)
    assert low.dtype == high.dtype == torch.bfloat16
    exact, _ = DTCWT()(x.float())
    assert (low.float() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.slow
@pytest.mark.parametrize("size", [9, 14, 130])
def test_transform_compiles_without_a_graph_break(size):
    class RoundTrip(nn.Module):
        def __init__(self):
            super().__init__()
            self.transform = DTCWT()

        def forward(self, x):
            low, high = self.transform(x)
            return self.transform.inverse(2 * low, 2 * high, (size, size))

    x = grid_of(size, size, channels=1)
    compiled = torch.compile(RoundTrip(), fullgraph=True, dynamic=False, backend="aot_eager")
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
    weights = {"token_blend.weight1": torch.full((2, 4, 6, 6), 0.5), "token_blend.bias1": torch.ones(2, 4, 6)}
    resized = ScatteringMixer.resize_weights(weights, (11, 20))
    assert resized["token_blend.weight1"].shape == (2, 6, 10, 10)
    assert torch.allclose(resized["token_blend.weight1"].sum(2), torch.tensor(0.5 * 6))
    assert torch.allclose(resized["token_blend.bias1"], torch.ones(2, 6, 10))
