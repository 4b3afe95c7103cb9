"""One level of the 2-D dual-tree complex wavelet transform on channels-last grids.

SVT's scattering layers use this transform (SVT, section 3): level 1 of the DTCWT of Selesnick, Baraniuk and
Kingsbury (2005) with the biorthogonal `near_sym_b` filters and half-sample symmetric extension. At level 1, the
two trees are the even and the odd samples of an undecimated transform. Each of the three high-pass images
becomes two complex bands: every 2x2 pixels give one number of each.

Each axis is filtered by a product with a small dense matrix, which includes the extension and the padding of odd
sizes. This takes more arithmetic but less time than a convolution, for the grid sizes of image models. The matrix
also includes the sums and differences that turn 2x2 pixels into complex numbers, so the product gives the bands in
the layout that the blending needs.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .matrices import builder, matrix, multiply
from .precision import autocast_off
from .resampling import Grid

# near_sym_b: the first half of each symmetric filter of odd length, including its centre.
_ANALYSIS_LOW = (-9 / 5120, 0.0, 57 / 2560, -3 / 64, -247 / 5120, 19 / 64, 711 / 1280)
_SYNTHESIS_LOW = (
    7.062639508928571e-05, 0.0, -0.0013419015066964285, -0.0018833705357142855, 0.007156808035714285,
    0.023856026785714284, -0.05564313616071428, -0.05168805803571428, 0.29975760323660716, 0.5594308035714286,
)  # fmt: skip


def _taps(half: tuple[float, ...]) -> tuple[float, ...]:
    """Complete a symmetric filter and scale it by 2 ** -1/4.

    Filtering both axes then includes the factor 1 / sqrt(2) of turning 2x2 pixels into complex numbers. The low-pass
    image has no such factor, so its matrices undo the scaling.
    """
    return tuple(2**-0.25 * tap for tap in half + half[-2::-1])


def _alternate(taps: tuple[float, ...]) -> tuple[float, ...]:
    """Derive a high-pass from the other channel's low-pass: taps at odd distance from the centre change sign."""
    centre = len(taps) // 2
    return tuple(-tap if (i - centre) % 2 else tap for i, tap in enumerate(taps))


# (low, high)
ANALYSIS = _taps(_ANALYSIS_LOW), _alternate(_taps(_SYNTHESIS_LOW))
SYNTHESIS = _taps(_SYNTHESIS_LOW), _alternate(_taps(_ANALYSIS_LOW))


def padded_grid(grid: Grid) -> Grid:
    """Round (H, W) up to even numbers, the size of the low-pass image."""
    return grid[0] + grid[0] % 2, grid[1] + grid[1] % 2


def _filter_matrix(taps: tuple[float, ...], size: int) -> Tensor:
    """(size, size) float64 CPU matrix that filters `size` samples with half-sample symmetric extension."""
    half = len(taps) // 2
    place = torch.arange(size)[:, None] + torch.arange(-half, half + 1)
    place = place % (2 * size)
    place = torch.where(place < size, place, 2 * size - 1 - place)
    values = torch.tensor(taps, dtype=torch.float64).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add(1, place, values)


def _even_then_odd(matrix: Tensor) -> Tensor:
    return torch.cat((matrix[0::2], matrix[1::2]))


@builder
def analysis_matrix(size: int) -> Tensor:
    """(2 * even size, size) float64 matrix to the even and odd samples of the low-pass, then the high-pass signal.

    A signal of odd length repeats its last sample.
    """
    even = size + size % 2
    filters = torch.cat([_even_then_odd(_filter_matrix(taps, even)) for taps in ANALYSIS])
    if even == size:
        return filters
    return torch.cat((filters[:, : size - 1], filters[:, size - 1 :].sum(1, keepdim=True)), 1)


@builder
def synthesis_matrix(size: int) -> Tensor:
    """(size, 2 * even size) float64 matrix, the inverse of `analysis_matrix`; it crops the padding."""
    even = size + size % 2
    return torch.cat([_even_then_odd(_filter_matrix(taps, even).T).T for taps in SYNTHESIS], 1)[:size]


@builder
def _low_analysis(size: int) -> Tensor:
    """(even size, size) float64 matrix to the low-pass signal, in sample order and without the scaling."""
    return 2**0.25 * analysis_matrix(size).unflatten(0, (4, -1))[:2].transpose(0, 1).flatten(0, 1)


@builder
def _low_synthesis(size: int) -> Tensor:
    return 2**0.25 * synthesis_matrix(size).unflatten(1, (4, -1))[:, :2].transpose(1, 2).flatten(1)


@builder
def _rows_analysis(size: int) -> Tensor:
    """(2 * even size, size) float64, `analysis_matrix` with rows ordered (pair, low or high, even or odd)."""
    return analysis_matrix(size).unflatten(0, (2, 2, -1)).permute(2, 0, 1, 3).flatten(0, 2)


@builder
def _rows_synthesis(size: int) -> Tensor:
    return synthesis_matrix(size).unflatten(1, (2, 2, -1)).permute(0, 3, 1, 2).flatten(1)


@builder
def _bands_analysis(size: int) -> Tensor:
    """(12w, 4 * size) float64 matrix from a pair of filtered rows to the bands of w squares, w = even size / 2.

    Columns are ordered (low or high, even or odd row, position), rows (square, orientation, real or imaginary).
    """
    return _bands_matrix(analysis_matrix(size))


@builder
def _bands_synthesis(size: int) -> Tensor:
    return _bands_matrix(synthesis_matrix(size).T).T


def _bands_matrix(filters: Tensor) -> Tensor:
    """Build `_bands_analysis` from the filters for the width, (4w, size).

    A square with the pixels a b above c d gives two complex numbers, (a - d) + (b + c)i and (a + d) + (b - c)i.
    """
    low_even, low_odd, high_even, high_odd = filters.unflatten(0, (4, -1))
    at15, at165 = _complex_pair(low_even, low_odd, of_high_rows=True)
    at45, at135 = _complex_pair(high_even, high_odd, of_high_rows=True)
    at75, at105 = _complex_pair(high_even, high_odd, of_high_rows=False)
    return torch.stack((at15, at45, at75, at105, at135, at165), 1).flatten(0, 2)


def _complex_pair(even: Tensor, odd: Tensor, of_high_rows: bool) -> Iterator[Tensor]:
    """Yield the rows (w, 2, 4 * size) of `_bands_matrix` for two complex bands of high-pass or low-pass rows."""
    for real, imaginary in (((even, -odd), (odd, even)), ((even, odd), (odd, -even))):
        parts = torch.stack((torch.cat(real, 1), torch.cat(imaginary, 1)), 1)
        nothing = torch.zeros_like(parts)
        yield torch.cat((nothing, parts) if of_high_rows else (parts, nothing), 2)


def analyse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Transform a grid (B, H, W, C) to its low-pass image and its bands, in the dtype of x with autocast off.

    The low-pass image is (B, H', W', C), where H' and W' are H and W rounded up to even numbers. The six complex bands
    (B, H'/2, W'/2, 6, 2, C) are oriented at 15, 45, 75, 105, 135 and 165 degrees, real part first. Products accumulate
    in float32. `synthesise` reconstructs x with a relative error of 1e-5 in float32 and 1e-2 in bfloat16.
    """
    batch, height, width, channels = x.shape
    with autocast_off(x):
        low = multiply(matrix(_low_analysis, height, like=x), x.flatten(2))
        low = multiply(matrix(_low_analysis, width, like=x), low.view(-1, width, channels))
        rows = multiply(matrix(_rows_analysis, height, like=x), x.flatten(2))
        bands = multiply(matrix(_bands_analysis, width, like=x), rows.view(-1, 4 * width, channels))
        high, wide = padded_grid((height, width))
        return low.view(batch, high, wide, channels), bands.view(batch, high // 2, wide // 2, 6, 2, channels)


def synthesise(low: Tensor, bands: Tensor, grid: Grid) -> Tensor:
    """Invert `analyse`: return the (B, H, W, C) tokens of the low-pass image and the bands; `grid` is (H, W)."""
    height, width = grid
    batch, channels = low.shape[0], low.shape[3]
    with autocast_off(low):
        rows = multiply(matrix(_bands_synthesis, width, like=low), bands.to(low.dtype).flatten(0, 1).flatten(1, 3))
        low = multiply(matrix(_low_synthesis, width, like=low), low.flatten(0, 1))
        rows = rows.view(batch, -1, width * channels)
        image = multiply(matrix(_low_synthesis, height, like=low), low.view(batch, -1, width * channels))
        image = multiply(matrix(_rows_synthesis, height, like=low), rows, add=image)
        return image.view(batch, height, width, channels)
