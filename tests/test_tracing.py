"""Models as graphs: torch.fx by timm and by torchvision, torch.jit.trace, torch.export, TorchScript."""

import pytest
import torch
from small_models import KINDS, create, images, is_vanilla
from timm.models import get_notrace_functions, get_notrace_modules
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from models import ARCHITECTURES
from models.mixers import MIXERS, build_mixer
from models.scattering import MIXINGS

MORE = 5  # images a batch, other than those that are traced with


def timms_tracer():
    return {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }


def extractor(model, **tracer):
    """The model by torch.fx, as timm's own tests build it: (what to call, the name of the output)."""
    training, evaluation = get_graph_node_names(model, tracer_kwargs=tracer)
    nodes = {"train_return_nodes": training[-1:], "eval_return_nodes": evaluation[-1:]}
    return create_feature_extractor(model, **nodes, tracer_kwargs=tracer).train(model.training)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_fx_traces_the_forward_pass_by_timms_tracer_and_by_torchvisions(name):
    model = create(name).eval()
    for tracer in (timms_tracer(), {}):
        traced = extractor(model, **tracer)
        for batch in (2, MORE):
            (logits,) = traced(images(batch=batch)).values()
            assert torch.allclose(logits, model(images(batch=batch)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_torch_fx_traces_what_training_needs(name):
    model = create(name, drop_path_rate=0.1).train()
    (logits,) = extractor(model, **timms_tracer())(images()).values()
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("mixing", MIXINGS)
def test_torch_fx_traces_every_mixing_on_an_odd_grid(mixing):
    model = create("svt_h_s", mixing=mixing, img_size=(52, 44)).eval()
    (logits,) = extractor(model)(images(52, 44)).values()
    assert torch.allclose(logits, model(images(52, 44)), atol=1e-5)


def test_torch_fx_traces_token_labelling_with_a_box_and_without():
    model = create("svt_s", token_label=True, drop_path_rate=0.0).train()
    traced = torch.fx.symbolic_trace(model)
    for one, other in zip(traced(images(), (0, 0, 1, 2)), model(images(), (0, 0, 1, 2)), strict=True):
        assert one == other if isinstance(one, tuple) else torch.allclose(one, other, atol=1e-5)
    assert len(traced(images())[2]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_torchvision_extracts_what_a_block_and_its_parts_give(name):
    model = create(name).eval()
    block = "blocks.0" if is_vanilla(name) else "stages.0.blocks.0"
    parts, outputs, hooks = (block, f"{block}.mixer", f"{block}.mlp", f"{block}.mlp.fc1"), [], []
    for part in parts:
        hooks.append(model.get_submodule(part).register_forward_hook(lambda *args: outputs.append(args[-1])))
    model(images())
    for hook in hooks:
        hook.remove()
    features = create_feature_extractor(model, {part: part for part in parts})(images())
    for part, output in zip((parts[1], parts[3], parts[2], parts[0]), outputs, strict=True):  # as they end
        assert torch.allclose(features[part], output, atol=1e-5), part


def of_any_batch(model, example):
    """The model by torch.jit.trace and by torch.export, with the number of images left open."""
    batch = torch.export.Dim("batch", min=1, max=64)
    yield torch.jit.trace(model, example, check_trace=False)
    yield torch.export.export(model, (example,), dynamic_shapes=({0: batch},)).module()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", KINDS)
def test_traced_and_exported_models_take_any_number_of_images(name):
    shallow = {"depth": 2, "alpha": 1} if is_vanilla(name) else {"depths": (1, 1, 1, 1)}
    model = create(name, **shallow).eval()
    for graph in of_any_batch(model, images()):
        for size in (1, MORE):
            assert torch.allclose(graph(images(batch=size)), model(images(batch=size)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", MIXERS)
def test_traced_and_exported_mixers_take_any_number_of_images(name):
    torch.manual_seed(0)
    mixer = build_mixer(name, 16, (7, 6), 2)
    grids = torch.randn(MORE, 7, 6, 16)
    for graph in of_any_batch(mixer, grids[:2]):
        assert torch.allclose(graph(grids), mixer(grids), atol=1e-5)


@pytest.mark.slow
@pytest.mark.xfail(
    strict=True,
    raises=RuntimeError,
    reason="TorchScript, which torch has deprecated, takes autocast's device for a constant, and the mixers switch "
    "autocast off on the device of their input",
)
@pytest.mark.parametrize("name", ["spectformer_xs", "svt_h_s"])
def test_torchscript_compiles_a_model(name):
    torch.jit.script(create(name).eval())
