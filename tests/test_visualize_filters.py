"""tools.visualize_filters: what is drawn is what the layers do; every kind of model gets its figures."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.scattering import HALVED, MIXINGS, ScatteringMixer
from models.spectral_gate import SpectralGate
from tests.untrained import PYRAMID, VANILLA, save
from tools.visualize_filters import (
    draw_orientations,
    main,
    orientation_energies,
    spatial_kernels,
    transfer_functions,
)
from utils import UserError

STAGES = PYRAMID | {"depths": (2, 1, 1, 1)}
GATES = {"gates_magnitude.png", "gates_kernels.png"}
SCATTERING = {"scattering_low_pass.png", "scattering_blending.png", "scattering_orientations.png"}


@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (4, 5)])
def test_kernels_and_responses_are_what_the_gate_computes(grid):
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
    responses = transfer_functions(gate)
    torch.testing.assert_close(torch.fft.ifft2(torch.fft.fft2(signal) * responses).real, expected)


@pytest.mark.parametrize("mixing", MIXINGS)
def test_energies_are_those_of_the_transform_and_of_what_is_inverted(mixing):
    torch.manual_seed(0)
    mixer = ScatteringMixer(32, (8, 8), mixing)
    inverted = []
    inverse = mixer.wavelet.inverse
    mixer.wavelet.inverse = lambda low, high, grid: inverted.append(high) or inverse(low, high, grid)
    mixer.wavelet.register_forward_hook(lambda *args: None)  # nobody passes a hooked layer by
    x = torch.randn(2, 8, 8, 32)
    ((before, after),) = orientation_energies(mixer, [mixer], x)
    with torch.no_grad():
        mixer(torch.zeros_like(x))
        _, high = mixer.wavelet(x[..., 16:] if mixing in HALVED else x)
    changed = inverted[0] - inverted[1]
    torch.testing.assert_close(before.float(), high.square().sum((0, -1)).mean(1))
    torch.testing.assert_close(after.float(), changed.square().sum((0, -1)).mean(1))


def test_a_grating_has_its_energy_in_its_own_orientation():
    # Fine diagonal stripes: their wave vector points along 45 or along 135 degrees.
    place = torch.arange(16.0)
    for sign, bands in ((1, {1, 4}), (-1, {1, 4})):
        stripes = torch.cos(2.2 * (place[:, None] + sign * place)).expand(1, 4, 16, 16).permute(0, 2, 3, 1)
        mixer = ScatteringMixer(4, (16, 16))
        ((before, _),) = orientation_energies(mixer, [mixer], stripes)
        assert int(before.sum((1, 2)).argmax()) in bands


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


@pytest.mark.slow
def test_oriented_bands_stand_beside_the_one_image_that_they_are_of():
    image = np.random.default_rng(0).random((16, 24, 3))
    energies = {f"block {i}": (torch.rand(6, 4, 6), 1e-10 * torch.rand(6, 4, 6)) for i in range(2)}
    figure = draw_orientations(image, energies, "one image")
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert np.array_equal(pictures[0], image)
    amplitudes = [plane for _, after in energies.values() for plane in after.sqrt().numpy()]
    assert all(np.array_equal(*pair) for pair in zip(pictures[1:13], amplitudes, strict=True))
    bars = [axes for axes in figure.axes if axes.containers]
    assert all(axes.get_ylabel() == "% of the energy" for axes in bars) and "orientation" in bars[-1].get_xlabel()
    assert [text.get_text() for text in bars[0].get_legend().get_texts()] == ["before blending", "after"]
    scales = [axes.yaxis for axes in figure.axes if axes.get_label() == "<colorbar>"]
    figure.draw_without_rendering()
    assert all("10^{" in scale.get_offset_text().get_text() for scale in scales)
    assert all(scale.get_offset_text().get_size() == scale.get_ticklabels()[0].get_size() for scale in scales)


def test_what_cannot_be_drawn_is_refused(tmp_path):
    save(tmp_path / "plain.pth", kwargs=VANILLA | {"alpha": 0})
    save(tmp_path / "gated.pth")
    output = ["--output", str(tmp_path / "figures")]
    with pytest.raises(UserError, match="plain.pth.*neither"):
        main([str(tmp_path / "plain.pth"), *output])
    for channels, named in (
        ("0,99", "99.*only 32"),
        ("a", "channels"),
        ("0", "channels"),
        ("1,-2", "channels"),
    ):
        with pytest.raises(UserError, match=named):
            main([str(tmp_path / "gated.pth"), *output, "--channels", channels])
    assert not (tmp_path / "figures").exists()
