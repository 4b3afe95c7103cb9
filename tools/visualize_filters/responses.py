"""What spectral and scattering layers do to a signal."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate


def transfer_functions(gate: SpectralGate) -> Tensor:
    """The complex frequency response (C, H, W) of a gate over the full plane, zero frequency first.

    The gate stores half of it, and `irfft2` ignores what the weights of columns 0 and W / 2 would add to the
    imaginary part; so the response is that of the real kernel with which the gate convolves.
    """
    return torch.fft.fft2(spatial_kernels(gate))


def spatial_kernels(gate: SpectralGate) -> Tensor:
    """The real kernels (C, H, W), origin first, with which a gate convolves its grid circularly."""
    weight = torch.view_as_complex(gate.complex_weight.detach().double().contiguous())
    return torch.fft.irfft2(weight, s=gate.grid_size, dim=(0, 1)).permute(2, 0, 1)


@torch.no_grad()
def orientation_energies(
    model: nn.Module, mixers: Sequence[ScatteringMixer], images: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Energy of the oriented bands, before and after blending, of each mixer for images (B, 3, H, W).

    Each is (6, h, w): |z|^2 summed over channels, averaged over images. What blending makes of empty bands, from
    its biases, is subtracted first: it is the same for every image and orientation.
    """
    bands: dict[nn.Module, Tensor] = {}
    hooks = [
        mixer.wavelet.register_forward_hook(lambda module, _, out: bands.update({module: out[1]})) for mixer in mixers
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    energies = []
    for mixer in mixers:
        before = bands[mixer.wavelet]
        after = mixer.blend(before) - mixer.blend(torch.zeros_like(before[:, :, :1]))
        energies.append((energy(before), energy(after)))
    return energies


def energy(bands: Tensor) -> Tensor:
    return bands.double().square().sum((0, -1)).mean(1)
