"""The table of token mixers, (B, H, W, C) to (B, H, W, C). To add one, write its class and an entry.

An entry builds a mixer from its width, its (height, width) grid and a number of heads, of which it takes what
it needs, and the options of its own. A mixer whose weights depend on the grid has `set_grid_size(grid)` and
`resize_weights(weights, grid)`.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from .layers import Attention, Grid
from .scattering import ScatteringMixer
from .spectral_gate import SpectralGate


def _attention(dim: int, _grid: Grid, num_heads: int) -> nn.Module:
    return Attention(dim, num_heads)


def _spectral(dim: int, grid: Grid, _num_heads: int) -> nn.Module:
    return SpectralGate(dim, grid)


def _scattering(dim: int, grid: Grid, _num_heads: int, mixing: str, backend: str = "native") -> nn.Module:
    return ScatteringMixer(dim, grid, mixing, backend)


MIXERS: dict[str, Callable[..., nn.Module]] = {
    "attention": _attention,
    "spectral": _spectral,
    "scattering_channel": partial(_scattering, mixing="channel"),
    "scattering_channel_token": partial(_scattering, mixing="channel_token"),
    "scattering_token": partial(_scattering, mixing="token"),
}


def build_mixer(name: str, dim: int, grid: Grid, num_heads: int, **options: str) -> nn.Module:
    """The mixer called `name`; ValueError if there is none, TypeError for an option it does not have."""
    if name not in MIXERS:
        raise ValueError(f"no mixer is called {name!r}; there are {', '.join(MIXERS)}")
    return MIXERS[name](dim, grid, num_heads, **options)
