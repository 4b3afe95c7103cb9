"""tools/visualize_filters.py: what is drawn is what the layers do; every kind of model gets its figures."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import checkpointing
import models  # noqa: F401 (registers the models)
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate
from tools import visualize_filters
from utils import UserError

PYRAMID = {
    "stem_width": 8,
    "embed_dims": (16, 16, 32, 32),
    "depths": (2, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
    "mlp_ratios": (1, 1, 1, 1),
}
GATES = {"gates_magnitude.png", "gates_kernels.png"}
SCATTERING = {"scattering_low_pass.png", "scattering_blending.png", "scattering_orientations.png"}


def save(path: Path, arch: str, size: tuple[int, int], **kwargs) -> None:
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=3, img_size=size, **kwargs)
    state = {"model": model.state_dict(), "arch": arch, "model_kwargs": kwargs, "num_classes": 3}
    checkpointing.save(path, state | {"input_size": list(size)})


@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (4, 5)])
def test_kernels_and_responses_are_what_the_gate_computes(grid):
    torch.manual_seed(0)
    gate = SpectralGate(3, grid).double()
    x = torch.randn(1, *grid, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = gate(x)[0].permute(2, 0, 1)
    signal = x[0].permute(2, 0, 1)
    kernels = visualize_filters.spatial_kernels(gate)
    by_shifts = sum(
        kernels[:, i, j, None, None] * signal.roll((i, j), (1, 2)) for i in range(grid[0]) for j in range(grid[1])
    )
    torch.testing.assert_close(by_shifts, expected)
    responses = visualize_filters.transfer_functions(gate)
    torch.testing.assert_close(torch.fft.ifft2(torch.fft.fft2(signal) * responses).real, expected)


@pytest.mark.parametrize("mixing", ["channel", "token", "channel_token"])
def test_energies_are_those_of_the_transform_and_of_what_is_inverted(mixing):
    torch.manual_seed(0)
    mixer = ScatteringMixer(32, (8, 8), mixing)
    inverted = []
    inverse = mixer.wavelet.inverse
    mixer.wavelet.inverse = lambda low, high, grid: inverted.append(high) or inverse(low, high, grid)
    mixer.wavelet.register_forward_hook(lambda *args: None)  # nobody passes a hooked layer by
    x = torch.randn(2, 8, 8, 32)
    ((before, after),) = visualize_filters.orientation_energies(mixer, [mixer], x)
    with torch.no_grad():
        mixer(torch.zeros_like(x))
        _, high = mixer.wavelet(x[..., 16:] if mixing == "channel_token" else x)
    changed = inverted[0] - inverted[1]
    torch.testing.assert_close(before.float(), high.square().sum((0, -1)).mean(1))
    torch.testing.assert_close(after.float(), changed.square().sum((0, -1)).mean(1))


def test_a_grating_has_its_energy_in_its_own_orientation():
    # Fine diagonal stripes: their wave vector points along 45 or along 135 degrees.
    place = torch.arange(16.0)
    for sign, bands in ((1, {1, 4}), (-1, {1, 4})):
        stripes = torch.cos(2.2 * (place[:, None] + sign * place)).expand(1, 4, 16, 16).permute(0, 2, 3, 1)
        mixer = ScatteringMixer(4, (16, 16))
        ((before, _),) = visualize_filters.orientation_energies(mixer, [mixer], stripes)
        assert int(before.sum((1, 2)).argmax()) in bands


@pytest.mark.parametrize(
    ("arch", "kwargs", "expected"),
    [
        ("spectformer_h_s", PYRAMID | {"spectral_depths": (2, 1, 0, 0)}, GATES),
        ("svt_h_s", PYRAMID | {"spectral_depths": (1, 1, 0, 0)}, SCATTERING),
        ("svt_h_s", PYRAMID | {"spectral_depths": (1, 0, 0, 0), "mixing": "token"}, SCATTERING),
    ],
)
def test_every_kind_of_model_gets_its_figures(tmp_path, arch, kwargs, expected):
    save(tmp_path / "a.pth", arch, (64, 48), **kwargs)
    visualize_filters.main([str(tmp_path / "a.pth"), "--output", str(tmp_path / "figures"), "--channels", "3"])
    written = list((tmp_path / "figures").iterdir())
    assert {path.name for path in written} == expected
    for path in written:
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 30


def test_what_cannot_be_drawn_is_refused(tmp_path):
    save(tmp_path / "plain.pth", "spectformer_ti", (32, 32), embed_dim=32, depth=1, alpha=0, num_heads=2)
    save(tmp_path / "gated.pth", "spectformer_ti", (32, 32), embed_dim=32, depth=1, alpha=1, num_heads=2)
    output = ["--output", str(tmp_path / "figures")]
    with pytest.raises(UserError, match="plain.pth.*neither"):
        visualize_filters.main([str(tmp_path / "plain.pth"), *output])
    for channels, named in (
        ("0,99", "99.*only 32"),
        ("a", "channels"),
        ("0", "channels"),
        ("1,-2", "channels"),
    ):
        with pytest.raises(UserError, match=named):
            visualize_filters.main([str(tmp_path / "gated.pth"), *output, "--channels", channels])
    assert not (tmp_path / "figures").exists()
