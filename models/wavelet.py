"""One level of the 2-D dual-tree complex wavelet transform on channels-last grids.

The transform of SVT's scattering layers (SVT, section 3): level 1 of the DTCWT of Selesnick, Baraniuk and
Kingsbury (2005) with the biorthogonal `near_sym_b` filters and half-sample symmetric extension. At level 1
the two trees are the even and the odd samples of an undecimated transform: each of the three high-pass
images, 2x2 pixels at a time, becomes two complex bands.

Filtering an axis is a product with a small dense matrix, which holds the extension and the padding of odd
sizes. It does more arithmetic than a convolution and still takes less time, on any grid of an image model.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from .layers import Grid, autocast_off, full_precision

# near_sym_b: the first half of each odd, symmetric filter, its centre included.
_ANALYSIS_LOW = (-9 / 5120, 0.0, 57 / 2560, -3 / 64, -247 / 5120, 19 / 64, 711 / 1280)
_SYNTHESIS_LOW = (
    7.062639508928571e-05, 0.0, -0.0013419015066964285, -0.0018833705357142855, 0.007156808035714285,
    0.023856026785714284, -0.05564313616071428, -0.05168805803571428, 0.29975760323660716, 0.5594308035714286,
)  # fmt: skip


def _symmetric(half: tuple[float, ...]) -> tuple[float, ...]:
    return half + half[-2::-1]


def _alternate(taps: tuple[float, ...]) -> tuple[float, ...]:
    """The other channel's high-pass: taps at odd distance from the centre change sign."""
    centre = len(taps) // 2
    return tuple(-tap if (i - centre) % 2 else tap for i, tap in enumerate(taps))


def _scaled(taps: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(2**-0.25 * tap for tap in taps)


# (low, high). All are scaled by 2 ** -1/4, so that the images filtered twice carry the 1 / sqrt(2) that turning
# 2x2 pixels into complex numbers takes; the low-pass image, which does without it, is multiplied by sqrt(2).
ANALYSIS = _scaled(_symmetric(_ANALYSIS_LOW)), _scaled(_alternate(_symmetric(_SYNTHESIS_LOW)))
SYNTHESIS = _scaled(_symmetric(_SYNTHESIS_LOW)), _scaled(_alternate(_symmetric(_ANALYSIS_LOW)))


def padded_grid(grid: Grid) -> Grid:
    """(H, W) rounded up to even numbers: the size of the low-pass image."""
    return grid[0] + grid[0] % 2, grid[1] + grid[1] % 2


def _filter_matrix(taps: tuple[float, ...], size: int) -> Tensor:
    """(size, size) float64 matrix, on the CPU, that filters `size` samples extended half-sample symmetrically."""
    half = len(taps) // 2
    here = {"device": "cpu"}  # whatever device a model is being built on
    place = torch.arange(size, **here)[:, None] + torch.arange(-half, half + 1, **here)
    place = place % (2 * size)
    place = torch.where(place < size, place, 2 * size - 1 - place)
    values = torch.tensor(taps, dtype=torch.float64, **here).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64, **here).scatter_add(1, place, values)


def _even_then_odd(matrix: Tensor) -> Tensor:
    return torch.cat((matrix[0::2], matrix[1::2]))


def analysis_matrix(size: int) -> Tensor:
    """(2 * even size, size) float64: the even and the odd samples of the low-pass, then of the high-pass signal.

    An odd signal repeats its last sample.
    """
    even = size + size % 2
    matrix = torch.cat([_even_then_odd(_filter_matrix(taps, even)) for taps in ANALYSIS])
    if even == size:
        return matrix
    return torch.cat((matrix[:, : size - 1], matrix[:, size - 1 :].sum(1, keepdim=True)), 1)


def synthesis_matrix(size: int) -> Tensor:
    """(size, 2 * even size) float64: what `analysis_matrix` gives back to the signal, padding cropped."""
    even = size + size % 2
    return torch.cat([_even_then_odd(_filter_matrix(taps, even).T).T for taps in SYNTHESIS], 1)[:size]


def multiply(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """(n, m) matrix times dim 1 or 2, of m entries, of (B, H, W, C): batched products without copies."""
    batch = x.flatten(2) if dim == 1 else x.flatten(0, 1)
    product = torch.bmm(matrix.expand(batch.shape[0], -1, -1), batch)
    return product.unflatten(2, x.shape[2:]) if dim == 1 else product.unflatten(0, x.shape[:2])


# The pixels a b over c d of all 2x2 squares of an image, (B, H/2, W/2, C) each. Of an image filtered high-pass they
# make two complex numbers.
Square = tuple[Tensor, Tensor, Tensor, Tensor]
Complex = tuple[Tensor, Tensor]  # real and imaginary part


def images_of(filtered: Tensor) -> tuple[Square, Square, Square, Square]:
    """The images ll, lh, hl, hh in a grid (B, 2H, 2W, C) filtered along both axes, as views.

    The first letter says how the height was filtered, low-pass or high-pass, the second how the width was. Along
    each axis lie the even low-pass samples, the odd ones, the even high-pass samples and the odd ones.
    """
    rows = filtered.unflatten(1, (4, -1)).unbind(1)
    low_even, low_odd, high_even, high_odd = (row.unflatten(2, (4, -1)).unbind(2) for row in rows)
    return (
        (*low_even[:2], *low_odd[:2]),
        (*low_even[2:], *low_odd[2:]),
        (*high_even[:2], *high_odd[:2]),
        (*high_even[2:], *high_odd[2:]),
    )


def _filtered(ll: Square, lh: Square, hl: Square, hh: Square) -> Tensor:
    """The grid in which `images_of` finds these images."""
    rows = [(*one[i : i + 2], *other[i : i + 2]) for one, other in ((ll, lh), (hl, hh)) for i in (0, 2)]
    return torch.cat([torch.cat(row, 2) for row in rows], 1)


def _complex_pair(square: Square) -> tuple[Complex, Complex]:
    a, b, c, d = square
    return (a - d, b + c), (a + d, b - c)


def _square(first: Complex, second: Complex) -> Square:
    """The transpose of `_complex_pair`."""
    (real1, imaginary1), (real2, imaginary2) = first, second
    return real1 + real2, imaginary1 + imaginary2, imaginary1 - imaginary2, real2 - real1


def _to_bands(filtered: Tensor) -> tuple[Tensor, Tensor]:
    """A grid (B, 2H, 2W, C) filtered along both axes as low-pass image and bands (2, 6, B, H/2, W/2, C)."""
    (a, b, c, d), lh, hl, hh = images_of(filtered)
    low = torch.stack((torch.stack((a, b), 3), torch.stack((c, d), 3)), 2).flatten(3, 4).flatten(1, 2)
    (at15, at165), (at45, at135), (at75, at105) = map(_complex_pair, (hl, hh, lh))
    real, imaginary = zip(at15, at45, at75, at105, at135, at165, strict=True)
    return math.sqrt(2) * low, torch.stack(real + imaginary).unflatten(0, (2, 6))


def _from_bands(low: Tensor, bands: Tensor) -> Tensor:
    """The transpose of `_to_bands`, which undoes it up to a factor of 2."""
    rows = (math.sqrt(2) * low).unflatten(1, (-1, 2)).unbind(2)
    ll = tuple(pixels for row in rows for pixels in row.unflatten(2, (-1, 2)).unbind(3))
    planes = bands.flatten(0, 1).unbind()
    at15, at45, at75, at105, at135, at165 = zip(planes[:6], planes[6:], strict=True)
    return _filtered(ll, _square(at75, at105), _square(at15, at165), _square(at45, at135))


def fitting(matrix: Tensor, build: Callable[[int], Tensor], size: int, like: Tensor) -> Tensor:
    """The matrix in the dtype of `like`, if it is for a signal of `size` samples and exact enough, else one that is."""
    ready = min(matrix.shape) == size and like.dtype != torch.float64
    return (matrix if ready else build(size)).to(like)


@torch.fx.wrap
def analyse(x: Tensor, matrix_height: Tensor, matrix_width: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W, C) to low-pass image and bands, see `DTCWT`."""
    with autocast_off(x):
        height = fitting(matrix_height, analysis_matrix, x.shape[1], x)
        width = fitting(matrix_width, analysis_matrix, x.shape[2], x)
        return _to_bands(multiply(height, multiply(width, x, 2), 1))


@torch.fx.wrap
def synthesise(low: Tensor, bands: Tensor, grid: Grid, matrix_height: Tensor, matrix_width: Tensor) -> Tensor:
    """Low-pass image and bands to (B, H, W, C), see `DTCWT.inverse`."""
    with autocast_off(low):
        height = fitting(matrix_height, synthesis_matrix, grid[0], low)
        width = fitting(matrix_width, synthesis_matrix, grid[1], low)
        return multiply(width, multiply(height, _from_bands(low, bands.to(low.dtype)), 1), 2)


class DTCWT(nn.Module):
    """Level-1 dual-tree complex wavelet transform of (B, H, W, C), and its inverse.

    `forward` gives the low-pass image (B, H', W', C), H' and W' being H and W rounded up to even, and six
    complex bands (2, 6, B, H'/2, W'/2, C), real part first, oriented at 15, 45, 75, 105, 135, 165 degrees.
    `inverse` reconstructs the signal, up to 1e-5 of it in float32 and 1e-2 in bfloat16: both compute in the input's
    dtype with autocast off; products add up in float32. Any grid is accepted; that of construction has its matrices
    ready.
    """

    def __init__(self, grid_size: Grid):
        super().__init__()
        for name in ("analysis_height", "analysis_width", "synthesis_height", "synthesis_width"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.set_grid_size(grid_size)

    def set_grid_size(self, grid_size: Grid) -> None:
        """Prepare the matrices of another (H, W)."""
        self.grid_size = grid_size
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the matrices where they are: timm's hook for what loads a model that was built on meta."""
        device, (height, width) = self.analysis_height.device, self.grid_size
        self.analysis_height = analysis_matrix(height).to(device, torch.float32)
        self.analysis_width = analysis_matrix(width).to(device, torch.float32)
        self.synthesis_height = synthesis_matrix(height).to(device, torch.float32)
        self.synthesis_width = synthesis_matrix(width).to(device, torch.float32)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.init_non_persistent_buffers()  # which a cast to half precision, or `to_empty`, must not change
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return analyse(x, self.analysis_height, self.analysis_width)

    def inverse(self, low: Tensor, bands: Tensor, grid: Grid) -> Tensor:
        """The (B, H, W, C) signal of a low-pass image and its bands; `grid` = (H, W), which may be odd."""
        return synthesise(low, bands, grid, self.synthesis_height, self.synthesis_width)


@lru_cache
def _library_transforms(dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module]:
    try:
        from pytorch_wavelets import DTCWTForward, DTCWTInverse
    except ImportError as error:
        raise ImportError(
            f"the backend 'pytorch_wavelets' needs that package with setuptools<81 and PyWavelets: {error}"
        ) from error
    forward = DTCWTForward(J=1, biort="near_sym_b", qshift="qshift_b")
    inverse = DTCWTInverse(biort="near_sym_b", qshift="qshift_b")
    return forward.to(device, dtype), inverse.to(device, dtype)


class LibraryDTCWT(nn.Module):
    """`DTCWT` computed by the pytorch_wavelets package, which is imported only where this class is used."""

    def __init__(self, grid_size: Grid):
        super().__init__()
        _library_transforms(torch.float32, torch.device("cpu"))  # a missing package is an error here already
        self.set_grid_size(grid_size)

    def set_grid_size(self, grid_size: Grid) -> None:
        """The library has nothing to prepare for a grid."""
        self.grid_size = grid_size

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_off(x):
            signal = full_precision(x).permute(0, 3, 1, 2)
            transform, _ = _library_transforms(signal.dtype, signal.device)
            low, (high,) = transform(signal)
            return low.permute(0, 2, 3, 1).to(x.dtype), high.permute(5, 2, 0, 3, 4, 1).to(x.dtype)

    def inverse(self, low: Tensor, bands: Tensor, grid: Grid) -> Tensor:
        """See `DTCWT.inverse`."""
        with autocast_off(low):
            image = full_precision(low).permute(0, 3, 1, 2)
            high = full_precision(bands).permute(2, 5, 1, 3, 4, 0)
            _, transform = _library_transforms(image.dtype, image.device)
            x = transform((image, [high]))
            return x[:, :, : grid[0], : grid[1]].permute(0, 2, 3, 1).to(low.dtype)


WAVELET_BACKENDS = {"native": DTCWT, "pytorch_wavelets": LibraryDTCWT}
