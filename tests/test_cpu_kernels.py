"""The CPU kernels compute what the general formulation of a layer does, and its derivatives of every order."""

import copy

import pytest
import torch
from small_models import KINDS, create, images
from torch import nn
from torch.nn.utils import prune

from models import set_cpu_kernels, set_spectral_precision
from models.cpu import attention, feed_forward, scattering, spectral_product
from models.layers import Attention, FeedForward
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate, gate_by_products


class GateByProducts(SpectralGate):
    """The gate as it runs in half precision, in any precision."""

    def forward(self, x):
        return gate_by_products(self.spectral_input(x), self.complex_weight)


LAYERS = {
    "feed-forward": lambda: FeedForward(8, 12),
    "feed-forward with convolution": lambda: FeedForward(8, 12, depthwise=True),
    "scattering": lambda: ScatteringMixer(8, (12, 7)),
    "scattering on an odd grid": lambda: ScatteringMixer(8, (7, 5)),
    "attention": lambda: Attention(8, 2),
    "gate": lambda: GateByProducts(8, (5, 6)),
}
MODULES = (attention, feed_forward, scattering, spectral_product)


@pytest.fixture(autouse=True)
def kernels_on():
    yield
    set_cpu_kernels(True)


def build(name, dtype=torch.float64):
    torch.manual_seed(0)
    layer = LAYERS[name]().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    grid = getattr(layer, "grid_size", (5, 6))
    return layer, torch.randn(5, *grid, 8, dtype=dtype)


def general(layer):
    """The layer without its kernel."""
    layer = copy.deepcopy(layer)
    if isinstance(layer, Attention):
        layer.fused_attn = False  # PyTorch's fused attention has no second derivative on a CPU

    def call(x):
        set_cpu_kernels(False)
        try:
            return layer(x)
        finally:
            set_cpu_kernels(True)

    call.parameters, call.zero_grad = layer.parameters, layer.zero_grad
    return call


def runs_kernel(layer, x):
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
def test_values_and_gradients_are_those_of_the_general_formulation(name, images, monkeypatch):
    layer, x = build(name)
    for module in MODULES:
        monkeypatch.setattr(module, "images_per_slice", lambda *_: images)
    assert runs_kernel(layer, x) and not runs_kernel(general(layer), x)
    results = values_and_gradients(layer, x)
    for one, other in zip(results, values_and_gradients(general(layer), x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x).clone(), results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_both_orders_are_right(name):
    layer, x = build(name)
    inputs = (x[:2].requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), inputs, fast_mode=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda x, *_: layer(x), inputs, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_tokens_and_gradients_in_another_order_in_memory_are_read_right(name):
    layer, x = build(name)
    gradient = torch.randn_like(x)
    for turned in (x.transpose(1, 2).contiguous().transpose(1, 2), x.movedim(3, 1).contiguous().movedim(1, 3)):
        torch.testing.assert_close(layer(turned), layer(x), rtol=1e-12, atol=1e-12)
    for other in (gradient.transpose(1, 2).contiguous().transpose(1, 2), gradient[:, :1, :1].expand_as(x)):
        one, two = (torch.autograd.grad(layer(x.requires_grad_()), x, g)[0] for g in (other, other.contiguous()))
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_half_precision_is_as_exact_as_the_general_formulation(name):
    layer, x = build(name)
    exact = values_and_gradients(layer, x)
    layer, x = layer.float(), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16 and runs_kernel(layer, x)
        found = [values_and_gradients(call, x) for call in (layer, general(layer))]
    for one, other, reference in zip(*found, exact, strict=True):
        errors = [((tensor.double() - reference).norm() / reference.norm()).item() for tensor in (one, other)]
        assert errors[0] < max(1.5 * errors[1], 0.03)


def test_scattering_computes_in_float32_under_autocast_where_it_should():
    layer, x = build("scattering", torch.float32)
    exact = layer(x)
    set_spectral_precision(layer, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), exact)
        set_spectral_precision(layer, "half")
        assert not torch.equal(layer(x), exact)


@pytest.mark.slow
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_keeps_the_kernel_for_batches_of_any_size(name, amp):
    layer, x = build(name, torch.float32)
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        for batch in (x[:4], x[:3]):
            torch.testing.assert_close(compiled(batch), layer(batch), rtol=1e-2, atol=1e-3)
    assert len(graphs) == 1 and "models_cpu" in str(graphs[0].graph)


def tokens(*shape):
    torch.manual_seed(0)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


OPERATIONS = {
    "feed_forward": lambda: (
        [tokens(3, 5, 6, 4), tokens(6, 4), tokens(6), tokens(6, 1, 3, 3), tokens(6), tokens(4, 6), tokens(4)],
        True,
    ),
    "scatter": lambda: (
        [tokens(2, 5, 6, 4), tokens(6, 6, 4), tokens(2, 4, 4), tokens(2, 4), tokens(2, 4, 4), tokens(2, 4)],
        True,
    ),
    "spectral_product": lambda: ([tokens(3, 2, 5, 4, 6), tokens(5, 4, 6, 2)],),
    "attend": lambda: ([tokens(3, 5, 4), tokens(3, 5, 4), tokens(3, 5, 4)],),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_kernels_are_registered_right(name):
    torch.library.opcheck(getattr(torch.ops.models_cpu, name).default, OPERATIONS[name]())


@pytest.mark.parametrize("name", LAYERS)
def test_transforms_of_torch_func_work(name):
    layer, x = build(name)
    torch.testing.assert_close(torch.vmap(lambda image: layer(image[None])[0])(x), layer(x))
    torch.testing.assert_close(torch.vmap(lambda factor: factor * layer(x))(torch.ones(2).double())[1], layer(x))
    if name == "attention":
        return  # PyTorch's fused attention has no forward mode on a CPU
    _, change = torch.func.jvp(layer, (x,), (x,))
    torch.testing.assert_close(change, (layer(x + 1e-6 * x) - layer(x - 1e-6 * x)) / 2e-6, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_models_have_second_batched_and_per_sample_gradients(name):
    model = create(name, drop_path_rate=0.0, img_size=32).double().eval()
    slow = create(name, drop_path_rate=0.0, img_size=32).double().eval()
    for module in slow.modules():
        module.fused_attn = False
    x = images(32, 32).double().requires_grad_()

    def penalty(model):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), list(model.parameters()), allow_unused=True)

    found = penalty(model)
    batched = torch.autograd.functional.jacobian(model, x, vectorize=True)
    weights = dict(model.named_parameters())

    def loss(weights, image):
        return torch.func.functional_call(model, weights, (image[None],)).square().sum()

    samples = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x.detach())
    set_cpu_kernels(False)
    for one, other in zip(found, penalty(slow), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(batched, torch.autograd.functional.jacobian(slow, x), rtol=1e-8, atol=1e-12)
    slow(x).square().sum().backward()
    for key, weight in slow.named_parameters():
        torch.testing.assert_close(samples[key].sum(0), weight.grad, rtol=1e-8, atol=1e-12)


def test_models_are_built_of_these_layers_and_the_switch_turns_all_kernels_off():
    model = create("svt_h_s")
    layers = [module for module in model.modules() if isinstance(module, (FeedForward, ScatteringMixer))]
    assert len(layers) == 7  # a feed-forward network in each of five blocks and the class block, one mixer
    ran = []
    for module in layers:
        module.register_forward_hook(lambda _module, _inputs, y: ran.append("models_cpu" in type(y.grad_fn).__name__))
    model(images())
    assert ran == [True] * 7
    set_cpu_kernels(False)
    model(images())
    assert ran[7:] == [False] * 7 and not runs_kernel(model, images())


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_that_somebody_replaced_or_pruned_are_called():
    layer, x = build("feed-forward with convolution")
    plain = layer(x)
    layer.fc2.__class__ = Doubled
    assert torch.allclose(layer(x), 2 * plain)
    layer.dwconv = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12).double()
    h = layer.dwconv(layer.fc1(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(h)))
    layer.act = nn.GELU("tanh")
    torch.testing.assert_close(layer(x), layer.fc2(layer.act(h)))
    layer.fc2.forward = lambda h: 7 * h  # as libraries do that move weights about
    torch.testing.assert_close(layer(x), 7 * layer.act(h))

    layer, x = build("feed-forward")
    prune.l1_unstructured(layer.fc1, "weight", amount=0.5)
    before = layer(x)
    with torch.no_grad():
        layer.fc1.weight_orig.mul_(2)
    assert not torch.allclose(layer(x), before)


HOOKS = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "before forward": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "before backward": lambda layer, hook: layer.register_full_backward_pre_hook(hook),
    "forward, of all modules": lambda _, hook: nn.modules.module.register_module_forward_hook(hook),
    "backward, of all modules": lambda _, hook: nn.modules.module.register_module_full_backward_hook(hook),
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
    assert layer.fc2 in called and runs_kernel(layer, x)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_torch_still_has_the_private_operations_of_onednn(monkeypatch):
    """If this fails, the feed-forward kernel is slower."""
    assert feed_forward._LINEAR_POINTWISE is not None and feed_forward._CONVOLUTION_POINTWISE is not None
    layer, x = build("feed-forward with convolution", torch.float32)
    fused = values_and_gradients(layer, x)
    monkeypatch.setattr(feed_forward, "_LINEAR_POINTWISE", None)
    monkeypatch.setattr(feed_forward, "_CONVOLUTION_POINTWISE", None)
    for one, other in zip(fused, values_and_gradients(layer, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
