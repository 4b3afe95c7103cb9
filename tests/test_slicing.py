"""Layers that take a few images at a time through all their steps compute what their plain formulation does."""

import pytest
import torch
from torch import nn

from models import feed_forward, scattering, scattering_cpu
from models.feed_forward import FeedForward
from models.scattering import ScatteringMixer

LAYERS = {
    "feed-forward": lambda: FeedForward(8, 12),
    "feed-forward with convolution": lambda: FeedForward(8, 12, depthwise=True),
    "scattering": lambda: ScatteringMixer(8, (12, 7)),
    "scattering on an odd grid": lambda: ScatteringMixer(8, (7, 5)),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    grid = getattr(layer, "grid_size", (5, 6))
    return layer, torch.randn(5, *grid, 8, dtype=dtype)


def plainly(monkeypatch):
    for module in (feed_forward, scattering):
        monkeypatch.setattr(module, "may_slice", lambda *_: False)


def values_and_gradients(layer, x):
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.pow(3).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_slices_give_the_plain_formulations_values_and_gradients(name, images, monkeypatch):
    layer, x = build(name)
    for module in (feed_forward, scattering_cpu):
        monkeypatch.setattr(module, "images_a_slice", lambda *_: images)
    sliced = values_and_gradients(layer, x)
    assert sliced[0].grad_fn is None and "InSlices" in type(layer(x.requires_grad_()).grad_fn).__name__
    plainly(monkeypatch)
    for one, other in zip(sliced, values_and_gradients(layer, x.detach()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_right(name):
    layer, x = build(name)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x[:2].requires_grad_(), *layer.parameters()))


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_in_another_order_in_memory_are_read_right(name):
    layer, x = build(name)
    gradient = torch.randn_like(x)
    for other in (gradient.transpose(1, 2).contiguous().transpose(1, 2), gradient[:, :1, :1].expand_as(x)):
        one, two = (torch.autograd.grad(layer(x.requires_grad_()), x, g)[0] for g in (other, other.contiguous()))
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", LAYERS)
def test_tokens_in_another_order_in_memory_are_read_right(name):
    layer, x = build(name)
    assert torch.equal(layer(x.transpose(1, 2).contiguous().transpose(1, 2)), layer(x))
    assert torch.equal(layer(x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)), layer(x))


@pytest.mark.parametrize("name", LAYERS)
def test_one_call_carries_nothing_over_to_the_next(name):
    layer, x = build(name)
    with torch.inference_mode():
        first = layer(x)
    once = values_and_gradients(layer, x)
    values_and_gradients(layer, 3 * x)
    assert torch.equal(first, once[0])
    for one, other in zip(once, values_and_gradients(layer, x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_inference_and_training_compute_the_same(name, dtype):
    layer, x = build(name, dtype)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(y.clone(), layer(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_autocast_is_obeyed(name, monkeypatch):
    layer, x = build(name, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == (torch.bfloat16 if name.startswith("feed") else torch.float32)
        plainly(monkeypatch)
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_functions_still_work(name):
    layer, x = build(name)
    weights = dict(layer.named_parameters())

    def output(weights):
        return torch.func.functional_call(layer, weights, (x,)).sum()

    layer(x).sum().backward()
    for name, gradient in torch.func.grad(output)(weights).items():
        torch.testing.assert_close(gradient, layer.get_parameter(name).grad)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_somebody_hooked_or_replaced_are_called():
    layer, x = build("feed-forward with convolution")
    plain, calls = layer(x), []
    hook = layer.dwconv.register_forward_hook(lambda *args: calls.append(args))
    assert torch.allclose(layer(x), plain) and len(calls) == 1
    hook.remove()
    layer.fc2.__class__ = Doubled
    assert torch.allclose(layer(x), 2 * plain)

    mixer, x = build("scattering")
    plain = mixer(x)
    mixer.channel_blend.register_forward_hook(lambda module, args, bands: 0 * bands)
    assert not torch.allclose(mixer(x), plain)
