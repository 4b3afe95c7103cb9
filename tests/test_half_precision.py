"""Under autocast: as exact as other models are, nothing out of range, nothing on another device."""

import pytest
import timm
import torch
from small_models import images
from torch._subclasses import FakeTensorMode

from models import ARCHITECTURES
from models.matrices import float32_product
from models.mixers import MIXERS, build_mixer
from models.wavelet import analyse, synthesise

PEERS = (("pvt_v2_b0", {}), ("deit_tiny_patch16_224", {"img_size": 64}))
OURS = [
    *(("svt_h_s", {"mixing": mixing}) for mixing in ("channel", "channel_token", "token", "token_half", "tensor")),
    ("spectformer_h_s", {}),
    ("spectformer_ti", {}),
    ("svt_vanilla_ti", {}),
]


def error_under_autocast(name, **arguments):
    """Of the logits of a model with fresh weights, in bfloat16 against float64, relative."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    batch = images(64, 64)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            half = model(batch)
        exact = model.double()(batch.double())
    return ((half.double() - exact).norm() / exact.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arguments"), OURS, ids=["-".join([n, *a.values()]) for n, a in OURS])
def test_logits_under_autocast_are_as_exact_as_the_peers(name, arguments):
    peers = max(error_under_autocast(peer, **size) for peer, size in PEERS)
    assert error_under_autocast(name, img_size=64, **arguments) < 1.1 * peers


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["float32", "bf16"])
def test_the_wavelet_reconstructs_as_exactly_as_its_precision_allows(dtype, bound):
    torch.manual_seed(0)
    x = torch.randn(2, 28, 27, 16).to(dtype)
    back = synthesise(*analyse(x), (28, 27))
    assert back.dtype == dtype
    assert (back.double() - x.double()).norm() < bound * x.double().norm()


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_float32_products_turn_tf32_off_for_all_derivatives_and_leave_the_setting_alone(precision, monkeypatch):
    seen, bmm = [], torch.bmm
    settings = torch.backends.cuda.matmul
    monkeypatch.setattr(torch, "bmm", lambda *args: seen.append(settings.fp32_precision) or bmm(*args))
    torch.set_float32_matmul_precision(precision)
    try:
        before = settings.fp32_precision
        pair = tuple(torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        assert torch.autograd.gradcheck(float32_product, pair) and torch.autograd.gradgradcheck(float32_product, pair)
        assert torch.equal(float32_product(*pair), bmm(*pair))
        assert set(seen) == {"ieee"} and settings.fp32_precision == before
    finally:
        torch.set_float32_matmul_precision("highest")


SPECTRAL = [name for name in MIXERS if name.startswith(("spectral", "scattering"))]


@pytest.mark.parametrize("name", SPECTRAL)
def test_sums_over_a_large_grid_stay_in_the_range_of_float16(name):
    """56x56 tokens of one sign, as large as normalised ones get; a linear's gradient is 16,000 of 65,504."""
    torch.manual_seed(0)
    mixer = build_mixer(name, 16, (56, 56), 2)
    x = torch.full((1, 56, 56, 16), 50.0).requires_grad_()
    with torch.autocast("cpu", torch.float16):
        y = mixer(x)
        y.backward(torch.full_like(y, 0.1))
    assert y.isfinite().all() and x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in mixer.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (200, 312)], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_of_a_forward_pass_stays_behind_on_the_cpu(name, size):
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:  # whose tensors need no device
        model._apply(lambda tensor: torch.empty_like(fake.from_tensor(tensor), device="cuda"))
        devices = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())}
        logits = model(torch.empty(2, 3, *size, device="cuda"))
    assert devices == {logits.device.type} == {"cuda"}
