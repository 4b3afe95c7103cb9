"""Filters and blending weights on grids other than their own, as a detector's images ask for."""

import pytest
import torch
from torch.func import functional_call

from models.mixers import build_mixer

OWN, ODD = (6, 8), (7, 5)
NAMES = ["spectral", "scattering_channel", "scattering_token", "scattering_channel_token"]


def mixer(name, grid=OWN):
    torch.manual_seed(0)
    built = build_mixer(name, 8, grid, 1).double()
    for weight in built.parameters():  # away from the kinks of the ReLUs, and large enough to matter
        weight.data.mul_(10)
    return built


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_right_at_an_odd_grid_that_is_not_square(name):
    layer = mixer(name)
    weights = {key: weight.detach().requires_grad_() for key, weight in layer.named_parameters()}
    x = torch.randn(1, *ODD, 8, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return functional_call(layer, dict(zip(weights, values, strict=True)), x)

    assert run(x, *weights.values()).shape == x.shape
    assert torch.autograd.gradcheck(run, (x, *weights.values()), fast_mode=True)


@pytest.mark.parametrize("name", NAMES)
def test_resampling_at_each_call_is_resampling_for_good(name):
    layer, resized = mixer(name), mixer(name)
    resized.set_grid_size(ODD)
    x = torch.randn(2, *ODD, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), resized(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_weights_of_the_same_grid_are_left_alone(name):
    layer = mixer(name)
    weights = layer.named_parameters()
    assert all(layer.resize_weight(name, weight, layer.grid_size) is weight for name, weight in weights)


@pytest.mark.parametrize("name", NAMES)
def test_height_and_width_are_not_taken_for_one_another(name):
    layer, turned = mixer(name), mixer(name)
    wide, high = (torch.randn(1, *grid, 8, dtype=torch.float64) for grid in ((5, 9), (9, 5)))
    assert layer(wide).shape == wide.shape and turned(high).shape == high.shape
    assert not torch.allclose(layer(wide).transpose(1, 2), layer(wide.transpose(1, 2)))
