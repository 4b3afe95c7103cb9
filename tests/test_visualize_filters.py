"""tools.visualize_filters: what is drawn is what the layers do; every kind of model gets its figures."""

import numpy as np
import pytest
import torch
from PIL import Image

from models import scattering
from models.scattering import MIXINGS, ScatteringMixer
from models.spectral_gate import SpectralGate
from models.wavelet import synthesise
from tests.untrained import PYRAMID, VANILLA, save
from tools.visualize_filters import band_panels, main, spatial_kernels
from utils import UserError

STAGES = PYRAMID | {"depths": (2, 1, 1, 1)}
GATES = {"gates_magnitude.png", "gates_kernels.png"}
SCATTERING = {"scattering_low_pass.png", "scattering_orientations.png"}


@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (4, 5)])
def test_kernels_are_what_the_gate_convolves_with(grid):
    torch.manual_seed(0)
    gate = SpectralGate(3, grid).double()
    x = torch.randn(1, *grid, 3, dtype=torch.float64)
    with torch.no_grad():
        expected = gate(x)[0].permute(2, 0, 1)
    signal = x[0].permute(2, 0, 1)
    kernels = spatial_kernels(gate)
    by_shifts = sum(
        kernels[:, i, j, None, None] * signal.roll((i, j), (1, 2)) for i in range(grid[0]) for j in range(grid[1])
    )
    torch.testing.assert_close(by_shifts, expected)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_amplitudes_are_those_of_what_is_inverted(mixing, monkeypatch):
    torch.manual_seed(0)
    mixer = ScatteringMixer(32, (8, 8), mixing)
    inverted = []
    monkeypatch.setattr("models.cpu.kernels._enabled", False)
    monkeypatch.setattr(
        scattering, "synthesise", lambda low, high, grid: inverted.append(high) or synthesise(low, high, grid)
    )
    x = torch.randn(2, 8, 8, 32)
    amplitudes = torch.stack([*band_panels(mixer, {"mixer": mixer}, x)["mixer"].values()])
    with torch.no_grad():
        mixer(torch.zeros_like(x))
    changed = inverted[0] - inverted[1]
    expected = changed.square().sum((-2, -1)).mean(0).permute(2, 0, 1)
    torch.testing.assert_close(amplitudes.square().float(), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "kwargs", "expected"),
    [
        ("spectformer_h_s", STAGES | {"spectral_depths": (2, 1, 0, 0)}, GATES),
        ("svt_h_s", STAGES | {"spectral_depths": (1, 1, 0, 0)}, SCATTERING),
        ("svt_h_s", STAGES | {"spectral_depths": (1, 0, 0, 0), "mixing": "token"}, SCATTERING),
        (
            "svt_h_s",
            STAGES | {"mixers": "scattering_tensor,scattering_token_half/spectral/conv/pool"},
            GATES | SCATTERING,
        ),
    ],
)
def test_every_kind_of_model_gets_its_figures(tmp_path, arch, kwargs, expected):
    save(tmp_path / "a.pth", arch, kwargs, input_size=(64, 48))
    main([str(tmp_path / "a.pth"), "--output", str(tmp_path / "figures"), "--channels", "3"])
    written = list((tmp_path / "figures").iterdir())
    assert {path.name for path in written} == expected
    for path in written:
        with Image.open(path) as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 30


def test_what_cannot_be_drawn_is_refused(tmp_path):
    save(tmp_path / "plain.pth", kwargs=VANILLA | {"alpha": 0})
    save(tmp_path / "gated.pth")
    output = ["--output", str(tmp_path / "figures")]
    with pytest.raises(UserError, match="plain.pth.*neither"):
        main([str(tmp_path / "plain.pth"), *output])
    with pytest.raises(UserError, match="channels"):
        main([str(tmp_path / "gated.pth"), *output, "--channels", "0"])
    assert not (tmp_path / "figures").exists()
