"""A drawn image and what the layers' transforms make of it."""

import numpy as np
import torch
from torch import Tensor

from models.layers import Grid
from models.wavelet import DTCWT


def flower(side: int) -> np.ndarray:
    """A flower, whose edges have every orientation: (side, side), 1 the darkest."""
    places = (np.arange(side) + 0.5) / side - 0.5
    rows, columns = np.meshgrid(places, places, indexing="ij")
    radius, angle = np.hypot(rows, columns), np.arctan2(rows, columns)
    petals = np.clip((0.34 + 0.09 * np.cos(5 * angle + 0.6) - radius) * side, 0, 1)
    heart = np.clip((0.12 - radius) * side, 0, 1)
    return 0.55 * petals * (0.75 + radius) + 0.5 * heart


def pooled(image: np.ndarray, grid: Grid) -> np.ndarray:
    """The image as a grid of tokens sees it: means over its cells."""
    (height, width), (rows, columns) = image.shape, grid
    return image.reshape(rows, height // rows, columns, width // columns).mean((1, 3))


def gated(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(spectrum, an example of a filter, tokens after it); half-planes with the lowest row frequency in the middle."""
    spectrum = np.fft.rfft2(tokens - tokens.mean())
    rows, columns = np.meshgrid(np.fft.fftfreq(tokens.shape[0]), np.fft.rfftfreq(tokens.shape[1]), indexing="ij")
    gate = np.exp(-(((np.hypot(rows, 1.4 * columns) - 0.17) / 0.06) ** 2))
    after = np.abs(np.fft.irfft2(spectrum * gate, tokens.shape))
    return np.fft.fftshift(np.abs(spectrum) ** 0.4, axes=0), np.fft.fftshift(gate, axes=0), after


def scattered(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(low-pass image, magnitudes of the six oriented bands, tokens with less of the first and more of these)."""
    grid = (tokens.shape[0], tokens.shape[1])
    wavelet = DTCWT(grid)
    low, high = wavelet(torch.from_numpy(tokens).float()[None, :, :, None])
    after = wavelet.inverse(0.4 * low, 1.6 * high, grid)
    return _plane(low), high.square().sum(0).sqrt()[:, 0, :, :, 0].numpy(), _plane(after)


def _plane(grid: Tensor) -> np.ndarray:
    return grid[0, :, :, 0].clamp_min(0).numpy()
