"""Layers that take a few images at a time through all their steps compute what their plain formulation does."""

import pytest
import torch
from small_models import create, images
from torch import nn
from torch.nn.utils import prune

pytest.importorskip("models.cpu", reason="without that folder all layers are the plain ones")
from models.cpu import FeedForward, ScatteringMixer, feed_forward, private, scattering  # noqa: E402

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
    for module in (feed_forward, scattering):
        monkeypatch.setattr(module, "images_per_slice", lambda *_: images)
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


TRANSFORMS = {
    "gradient for something else": lambda f: torch.func.grad(lambda factor: (f() * factor).sum())(torch.ones(())),
    "batch of something else": lambda f: torch.vmap(lambda factor: (f() * factor).sum())(torch.ones(3))[0],
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_may_stand_inside_a_transform_that_is_not_of_its_tensors(name, transform):
    layer, x = build(name, torch.float32)
    torch.testing.assert_close(transform(lambda: layer(x)), layer(x).sum())


@pytest.mark.parametrize("name", LAYERS)
def test_batched_and_forward_mode_transforms_of_a_layer_still_work(name):
    layer, x = build(name)
    torch.testing.assert_close(torch.vmap(lambda image: layer(image[None])[0])(x), layer(x))
    _, change = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(change, (layer(x + 1e-6 * x) - layer(x - 1e-6 * x)) / 2e-6, rtol=1e-4, atol=1e-4)


def in_slices(layer, x):
    return "InSlices" in type(layer(x).grad_fn).__name__


def test_models_are_built_of_these_layers():
    model = create("svt_h_s")
    slicing = (FeedForward, ScatteringMixer)
    found = [module for module in model.modules() if isinstance(module, slicing)]
    assert len(found) == 7  # a feed-forward network in each of five blocks and the class block, one mixer
    ran = []
    for module in found:
        module.register_forward_hook(lambda _module, _inputs, y: ran.append("InSlices" in type(y.grad_fn).__name__))
    model(images())
    assert len(ran) == 7 and all(ran)


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


HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "before forward": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "before backward": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "forward, of all modules": lambda _, hook: nn.modules.module.register_module_forward_hook(hook),
    "before forward, of all modules": lambda _, hook: nn.modules.module.register_module_forward_pre_hook(hook),
    "backward, of all modules": lambda _, hook: nn.modules.module.register_module_full_backward_hook(hook),
    "before backward, of all modules": lambda _, hook: nn.modules.module.register_module_full_backward_pre_hook(hook),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_every_kind_of_hook_is_seen_and_its_removal_too(register):
    layer, x = build("feed-forward")
    called = []
    hook = register(layer.fc2, lambda module, *_: called.append(module) and None)
    try:
        layer(x).sum().backward()
    finally:
        hook.remove()
    assert layer.fc2 in called
    assert in_slices(layer, x)


def test_a_layer_with_pruned_weights_computes_with_these():
    layer, x = build("feed-forward")
    prune.l1_unstructured(layer.fc1, "weight", amount=0.5)
    before = layer(x)
    with torch.no_grad():
        layer.fc1.weight_orig.mul_(2)
    assert not torch.allclose(layer(x), before)


def test_a_convolution_of_another_shape_is_called():
    layer, x = build("feed-forward with convolution")
    layer.dwconv = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12).double()
    h = layer.dwconv(layer.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(h)))


def test_a_layer_whose_forward_was_replaced_is_called():
    layer, x = build("feed-forward")
    layer.fc2.forward = lambda h: 7 * h  # as libraries do that move weights about
    torch.testing.assert_close(layer(x), 7 * layer.act(layer.fc1(x)))


def test_torch_still_has_what_is_taken_from_its_private_parts():
    """If this fails, inference has lost a fused operation, or hooks are no longer told from none: see `private`."""
    linear = nn.Linear(2, 2)
    assert not private.are_hooked((linear,))
    assert private.can_fuse(torch.empty(1)) == torch.backends.mkldnn.is_available()


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_the_fused_operation_is_convolution_and_gelu():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, 5, 7), torch.randn(6, 1, 3, 3), torch.randn(6)
    expected = nn.functional.gelu(nn.functional.conv2d(x, weight, bias, padding=1, groups=6))
    torch.testing.assert_close(private.convolve_and_activate(x, weight, bias), expected)
