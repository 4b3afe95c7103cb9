"""What has which colour."""

from torch import nn

from models.layers import Attention
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate

GATE, SCATTER, ATTEND = "#eda04c", "#35a08f", "#8c9ed4"
PLAIN, HEAD, PANEL = "#d5dae2", "#cbaad2", "#f5f6f9"
# The token mixers, each with its name.
MIXERS = {
    SpectralGate: ("spectral", GATE),
    ScatteringMixer: ("scattering", SCATTER),
    Attention: ("attention", ATTEND),
}


def mixer_of(block: nn.Module) -> tuple[str, str]:
    """The name and the colour of a block's mixer."""
    return next(told for kind, told in MIXERS.items() if isinstance(block.mixer, kind))
