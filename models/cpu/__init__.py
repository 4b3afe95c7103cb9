"""Layers that compute on a CPU what the plain ones do, a few images at a time.

Moving large intermediate results through memory, and asking the system for fresh pages to put them in, costs more
there than the arithmetic on them. The feed-forward network, the scattering mixer and the spectral gate therefore have a
second formulation, which takes a few images through all of their steps while these are in cache; in half precision
attention has one too. Each is an operation that a compiled graph keeps. These classes have the parameters
of the plain ones, whose formulation they fall back on everywhere else.
"""

from .attention import Attention
from .feed_forward import FeedForward
from .scattering import ScatteringMixer
from .spectral_gate import SpectralGate

__all__ = ["Attention", "FeedForward", "ScatteringMixer", "SpectralGate"]
