"""The gate by products of Fourier matrices, which half precision and exports run, is the FFT's in every derivative."""

import pytest
import torch

from models import spectral_gate
from models.spectral_gate import gate, gate_by_products


@pytest.mark.parametrize("way", ["by axis", "both axes", "with the CPU kernel"])
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 4), (4, 1)])
def test_products_are_the_fft_with_its_gradients_of_both_orders(grid, way, monkeypatch):
    if way != "with the CPU kernel":
        monkeypatch.setattr(spectral_gate, "may_run", lambda *_: False)
    if way == "by axis":
        monkeypatch.setattr(spectral_gate, "LARGEST_DENSE", 0)
    torch.manual_seed(0)
    x = torch.randn(2, *grid, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(grid[0], grid[1] // 2 + 1, 3, 2, dtype=torch.float64, requires_grad=True)
    derivatives = []
    for call in (gate, gate_by_products):
        y = call(x, weight)
        first = torch.autograd.grad(y.pow(3).sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(part.square().sum() for part in first), (x, weight))
        derivatives.append((y, *first, *second))
    for one, other in zip(*derivatives, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert torch.autograd.gradgradcheck(gate_by_products, (x, weight), fast_mode=True)
    torch.testing.assert_close(torch.vmap(gate_by_products, (0, None))(x[:, None], weight)[:, 0], gate(x, weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_spectrum_alone_and_is_as_exact_as_its_rounding(dtype):
    torch.manual_seed(0)
    x, weight = torch.randn(3, 14, 14, 8), torch.randn(14, 8, 8, 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gate(x.to(dtype).requires_grad_(), weight.requires_grad_())
    assert y.dtype == dtype and (y.float() - gate(x, weight)).norm() <= 0.01 * gate(x, weight).norm()
    assert [t.numel() for t in kept if t.requires_grad and t.numel() >= x.numel()] == [3 * 2 * 14 * 8 * 8]
