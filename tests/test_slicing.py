"""Layers that take a few images at a time through all their steps compute what their plain formulation does."""

import pytest
import torch
from small_models import create, images
from torch import nn
from torch.nn.utils import prune

from models import set_spectral_precision
from models.wavelet import analysis_matrix, synthesis_matrix

pytest.importorskip("models.cpu", reason="without that folder all layers are the plain ones")
from models.cpu import (  # noqa: E402
    Attention,
    FeedForward,
    ScatteringMixer,
    SpectralGate,
    attention,
    feed_forward,
    private,
    scattering,
    spectral_gate,
)

LAYERS = {
    "feed-forward": lambda: FeedForward(8, 12),
    "feed-forward with convolution": lambda: FeedForward(8, 12, depthwise=True),
    "scattering": lambda: ScatteringMixer(8, (12, 7)),
    "scattering on an odd grid": lambda: ScatteringMixer(8, (7, 5)),
    "spectral gate": lambda: SpectralGate(8, (12, 7)),
    "spectral gate on an even grid": lambda: SpectralGate(8, (6, 8)),
}


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer = HALF[name]().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    grid = getattr(layer, "grid_size", (5, 6))
    return layer, torch.randn(5, *grid, 8, dtype=dtype)


HALF = {
    **LAYERS,
    "attention": lambda: Attention(8, 2),
}
MODULES = (attention, feed_forward, scattering, spectral_gate)


def plainly(monkeypatch):
    for module in MODULES:
        monkeypatch.setattr(module, "may_slice", lambda *_, **__: False)


def in_slices(layer, x):
    """Whether an operation of that folder's computes what the layer gives."""
    waiting, found = [layer(x.requires_grad_()).grad_fn], set()
    while waiting:
        function = waiting.pop()
        found.add(type(function).__name__)
        waiting += [following for following, _ in function.next_functions if following is not None]
    return any("models_cpu" in name for name in found)


def values_and_gradients(layer, x):
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.pow(3).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad.clone() for parameter in layer.parameters())]


@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_slices_give_the_plain_formulations_values_and_gradients(name, images, monkeypatch):
    layer, x = build(name)
    for module in MODULES:
        monkeypatch.setattr(module, "images_per_slice", lambda *_: images)
    sliced = values_and_gradients(layer, x)
    assert in_slices(layer, x)
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

    def results():
        with torch.inference_mode():
            inferred = layer(x)
        return [inferred, *values_and_gradients(layer, x)]

    once = results()
    values_and_gradients(layer, 3 * x)
    for one, other in zip(once, results(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_inference_and_training_compute_the_same(name, dtype):
    layer, x = build(name, dtype)
    with torch.inference_mode():
        y = layer(x)
    torch.testing.assert_close(y.clone(), layer(x).detach(), rtol=1e-5, atol=1e-5)


def relative_errors(tensors, references):
    pairs = zip(tensors, references, strict=True)
    return [((one.double() - other).norm() / other.norm()).item() for one, other in pairs]


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_as_exact_in_slices_as_the_plain_formulation(name, monkeypatch):
    layer, x = build(name)
    exact = values_and_gradients(layer, x)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and in_slices(layer, x)
        sliced = relative_errors(values_and_gradients(layer, x), exact)
        plainly(monkeypatch)
        plain = relative_errors(values_and_gradients(layer, x), exact)
    for one, other in zip(sliced, plain, strict=True):
        assert one < max(1.5 * other, 0.03)


@pytest.mark.parametrize("name", [name for name in HALF if name.startswith(("scattering", "spectral"))])
def test_spectral_mixers_compute_in_float32_under_autocast_where_told_to(name):
    layer, x = build(name, torch.float32)
    exact = layer(x)
    set_spectral_precision(layer, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        set_spectral_precision(layer, "half")
        assert not torch.equal(layer(x), exact)


def test_a_gate_on_a_large_grid_keeps_the_fft():
    layer, _ = build("spectral gate", torch.float32)
    small, large = torch.randn(1, 56, 40, 8), torch.randn(1, 40, 57, 8)
    assert in_slices(layer, small) and not in_slices(layer, large)
    with torch.autocast("cpu", torch.bfloat16):
        assert in_slices(layer, large) and not in_slices(layer, torch.randn(1, 201, 40, 8))


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", HALF)
def test_a_compiled_layer_keeps_the_operation_for_batches_of_any_size(name, amp):
    layer, x = build(name, torch.float32)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for batch in (x[:4], x[:3]):
            torch.testing.assert_close(compiled(batch), layer(batch), rtol=1e-2, atol=1e-3)
        sliced = in_slices(layer, x)
    assert len(graphs) == 1
    assert ("models_cpu" in str(graphs[0].graph)) == sliced == (amp or name in LAYERS)


def tokens(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


MATRICES = [matrix(size) for matrix in (analysis_matrix, synthesis_matrix) for size in (5, 6)]
OPERATIONS = {
    "feed_forward": lambda: (
        *(tokens(3, 5, 6, 4), True, tokens(6, 4), tokens(6)),
        *(tokens(6, 1, 3, 3), tokens(6), tokens(4, 6), tokens(4)),
    ),
    "scatter": lambda: (
        *(tokens(2, 5, 6, 4), True, *MATRICES, tokens(6, 6, 4)),
        *(tokens(2, 4, 4), tokens(2, 4), tokens(2, 4, 4), tokens(2, 4)),
    ),
    "gate": lambda: (tokens(2, 5, 6, 3), True, tokens(5, 4, 3, 2)),
    "attend": lambda: (tokens(3, 5, 4), tokens(3, 5, 4), tokens(3, 5, 4)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_say_the_truth_about_shapes_and_gradients(name):
    operation = getattr(torch.ops.models_cpu, name)
    arguments = OPERATIONS[name]()
    torch.library.opcheck(operation.default, arguments)
    assert torch.autograd.gradcheck(lambda *arguments: first(operation(*arguments)), arguments)


def first(results):
    return results[0] if isinstance(results, tuple) else results


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


def test_models_are_built_of_these_layers():
    model = create("svt_h_s")
    slicing = (FeedForward, ScatteringMixer)
    found = [module for module in model.modules() if isinstance(module, slicing)]
    assert len(found) == 7  # a feed-forward network in each of five blocks and the class block, one mixer
    assert sum(isinstance(module, Attention) for module in model.modules()) == 4
    ran = []
    for module in found:
        module.register_forward_hook(lambda _module, _inputs, y: ran.append("models_cpu" in type(y.grad_fn).__name__))
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
    """If this fails, operations of oneDNN are lost, or hooks are no longer told from none: see `private`."""
    linear = nn.Linear(2, 2)
    assert not private.are_hooked((linear,))
    assert private.can_fuse(torch.empty(1)) == torch.backends.mkldnn.is_available()
    assert private._LINEAR_POINTWISE is not None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_the_fused_operation_is_convolution_and_gelu():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, 5, 7), torch.randn(6, 1, 3, 3), torch.randn(6)
    expected = nn.functional.gelu(nn.functional.conv2d(x, weight, bias, padding=1, groups=6))
    torch.testing.assert_close(private.convolve_and_activate(x, weight, bias), expected)


@pytest.mark.parametrize("without", [None, "_LINEAR_POINTWISE"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_is_the_same_from_onednn_and_without_it(dtype, without, monkeypatch):
    if without:
        monkeypatch.setattr(private, without, None)
    torch.manual_seed(0)
    rows, matrix, out = torch.randn(7, 5, dtype=dtype), torch.randn(5, 3, dtype=dtype), torch.empty(7, 3, dtype=dtype)
    torch.testing.assert_close(private.product(rows, matrix, out), rows @ matrix)
