"""One level of the 2-D dual-tree complex wavelet transform on channels-last grids.

The transform of SVT's scattering layers (SVT, section 3): level 1 of the DTCWT of Selesnick, Baraniuk and
Kingsbury (2005) with the biorthogonal `near_sym_b` filters and half-sample symmetric extension. At level 1
the two trees are the even and the odd samples of an undecimated transform: each of the three high-pass
images, 2x2 pixels at a time, becomes two complex bands.

Filtering an axis is a product with a small dense matrix up to `MATRIX_LIMIT` samples, a depthwise convolution
above it.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Grid, autocast_off, full_precision

# Longest axis, in samples, that is filtered with a dense matrix.
MATRIX_LIMIT = 112

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


# (low, high). The high-pass filters carry the 1 / sqrt(2) that turning quads into complex numbers and back
# takes, so that only the diagonal band, filtered twice, needs a correction.
ANALYSIS = (
    _symmetric(_ANALYSIS_LOW),
    tuple(tap / math.sqrt(2) for tap in _alternate(_symmetric(_SYNTHESIS_LOW))),
)
SYNTHESIS = (
    _symmetric(_SYNTHESIS_LOW),
    tuple(tap / math.sqrt(2) for tap in _alternate(_symmetric(_ANALYSIS_LOW))),
)


def padded_grid(grid: Grid) -> Grid:
    """(H, W) rounded up to even numbers: the size of the low-pass image."""
    return grid[0] + grid[0] % 2, grid[1] + grid[1] % 2


def _filter_matrix(taps: tuple[float, ...], size: int) -> Tensor:
    """(size, size) float64 matrix that filters `size` samples extended half-sample symmetrically."""
    half = len(taps) // 2
    place = torch.arange(size)[:, None] + torch.arange(-half, half + 1)
    place = place % (2 * size)
    place = torch.where(place < size, place, 2 * size - 1 - place)
    values = torch.tensor(taps, dtype=torch.float64).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add(1, place, values)


def analysis_matrix(size: int) -> Tensor:
    """(2 * even size, size) float64: low-pass, then high-pass. An odd signal repeats its last sample."""
    even = size + size % 2
    matrix = torch.cat([_filter_matrix(taps, even) for taps in ANALYSIS])
    if even == size:
        return matrix
    return torch.cat((matrix[:, : size - 1], matrix[:, size - 1 :].sum(1, keepdim=True)), 1)


def synthesis_matrix(size: int) -> Tensor:
    """(size, 2 * even size) float64: low-pass and high-pass half back to the signal, padding cropped."""
    even = size + size % 2
    return torch.cat([_filter_matrix(taps, even) for taps in SYNTHESIS], 1)[:size]


def _convolve(x: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
    """Filter (B, H, W, C) along dim 1 or 2 with symmetric extension; the axis is longer than the filter."""
    half = len(taps) // 2
    head, tail = x.narrow(dim, 0, half), x.narrow(dim, x.shape[dim] - half, half)
    x = torch.cat((head.flip(dim), x, tail.flip(dim)), dim)
    shape = (1, 1, -1, 1) if dim == 1 else (1, 1, 1, -1)
    channels = x.shape[-1]
    kernel = torch.tensor(taps, dtype=x.dtype, device=x.device).view(shape).expand(channels, -1, -1, -1)
    return F.conv2d(x.permute(0, 3, 1, 2), kernel, groups=channels).permute(0, 2, 3, 1)


def _oriented(lh: Tensor, hl: Tensor, hh: Tensor) -> Tensor:
    """High-pass images (B, H, W, C), scaled by 1 / sqrt(2), as complex bands (B, 6, H/2, W/2, 2, C)."""
    bands: dict[int, Tensor] = {}
    for image, first, second in ((lh, 0, 5), (hh, 1, 4), (hl, 2, 3)):
        a, b = image[:, 0::2, 0::2], image[:, 0::2, 1::2]
        c, d = image[:, 1::2, 0::2], image[:, 1::2, 1::2]
        bands[first] = torch.stack((a - d, b + c), 3)
        bands[second] = torch.stack((a + d, b - c), 3)
    return torch.stack([bands[i] for i in range(6)], 1)


def _images(high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `_oriented`: six complex bands as the (lh, hl, hh) images, scaled by sqrt(2)."""
    images = []
    for first, second in ((0, 5), (2, 3), (1, 4)):
        (r1, i1), (r2, i2) = high[:, first].unbind(3), high[:, second].unbind(3)
        upper = torch.stack((r1 + r2, i1 + i2), 3)
        lower = torch.stack((i1 - i2, r2 - r1), 3)
        images.append(torch.stack((upper, lower), 2).flatten(3, 4).flatten(1, 2))
    return tuple(images)


class DTCWT(nn.Module):
    """Level-1 dual-tree complex wavelet transform of (B, H, W, C), and its inverse.

    `forward` gives the low-pass image (B, H', W', C), H' and W' being H and W rounded up to even, and six
    complex bands (B, 6, H'/2, W'/2, 2, C) oriented at 15, 45, 75, 105, 135, 165 degrees, real and imaginary
    part in dim 4. `inverse` reconstructs the signal exactly. Both compute in float32 with autocast off (in
    float64 for float64) and return the input's dtype. Any grid is accepted; that of construction has its
    matrices ready.
    """

    def __init__(self, grid_size: Grid):
        super().__init__()
        self._set_matrices(grid_size)

    def _set_matrices(self, grid_size: Grid, device: torch.device | None = None) -> None:
        self.grid_size = grid_size
        for axis, size in enumerate(grid_size):
            dense = size <= MATRIX_LIMIT
            for name, build in (("analysis", analysis_matrix), ("synthesis", synthesis_matrix)):
                matrix = build(size).to(device, torch.float32) if dense else None
                self.register_buffer(f"{name}{axis}", matrix, persistent=False)

    def set_grid_size(self, grid_size: Grid) -> None:
        """Prepare the matrices of another (H, W)."""
        self._set_matrices(grid_size, self._device())

    def _device(self) -> torch.device | None:
        return next((buffer.device for buffer in self.buffers()), None)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # A cast to half precision, or materialising from the meta device, must not change the filters.
        self._set_matrices(self.grid_size, self._device())
        return self

    def _matrix(self, name: str, axis: int, size: int, like: Tensor) -> Tensor | None:
        if size > MATRIX_LIMIT:
            return None
        if size == self.grid_size[axis] and like.dtype == torch.float32:
            return getattr(self, f"{name}{axis}")
        build = analysis_matrix if name == "analysis" else synthesis_matrix
        return build(size).to(like)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_off(x):
            rows, columns = padded_grid((x.shape[1], x.shape[2]))
            y = self._analyse(self._analyse(full_precision(x), 2), 1)
            low, hl = y[:, :rows, :columns], y[:, :rows, columns:]
            lh, hh = y[:, rows:, :columns], y[:, rows:, columns:]
            high = _oriented(lh, hl, hh * math.sqrt(2))
            return low.to(x.dtype), high.to(x.dtype)

    def inverse(self, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
        """The (B, H, W, C) signal of a low-pass image and its bands; `grid` = (H, W), which may be odd."""
        with autocast_off(low):
            lh, hl, hh = _images(full_precision(high))
            upper = torch.cat((full_precision(low), hl), 2)
            y = torch.cat((upper, torch.cat((lh, hh * math.sqrt(2)), 2)), 1)
            return self._synthesise(self._synthesise(y, 1, grid[0]), 2, grid[1]).to(low.dtype)

    def _analyse(self, x: Tensor, dim: int) -> Tensor:
        """Filter along dim 1 (H) or 2 (W), which comes back twice as long: low-pass, then high-pass half."""
        size = x.shape[dim]
        matrix = self._matrix("analysis", dim - 1, size, x)
        if matrix is not None:
            return _multiply(matrix, x, dim)
        if size % 2:
            x = torch.cat((x, x.narrow(dim, size - 1, 1)), dim)
        return torch.cat([_convolve(x, taps, dim) for taps in ANALYSIS], dim)

    def _synthesise(self, x: Tensor, dim: int, size: int) -> Tensor:
        """Undo `_analyse` along dim 1 or 2 for a signal of `size` samples."""
        matrix = self._matrix("synthesis", dim - 1, size, x)
        if matrix is not None:
            return _multiply(matrix, x, dim)
        halves = x.chunk(2, dim)
        total = sum(_convolve(half, taps, dim) for half, taps in zip(halves, SYNTHESIS, strict=True))
        return total.narrow(dim, 0, size)


def _multiply(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """(n, m) matrix times dim 1 or 2 of (B, H, W, C); batched products, no transposed copies."""
    if dim == 2:
        return torch.matmul(matrix, x)
    return torch.matmul(matrix, x.flatten(2)).unflatten(2, x.shape[2:])


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
            return low.permute(0, 2, 3, 1).to(x.dtype), high.permute(0, 2, 3, 4, 5, 1).to(x.dtype)

    def inverse(self, low: Tensor, high: Tensor, grid: Grid) -> Tensor:
        """See `DTCWT.inverse`."""
        with autocast_off(low):
            image = full_precision(low).permute(0, 3, 1, 2)
            bands = full_precision(high).permute(0, 5, 1, 2, 3, 4)
            _, transform = _library_transforms(image.dtype, image.device)
            x = transform((image, [bands]))
            return x[:, :, : grid[0], : grid[1]].permute(0, 2, 3, 1).to(low.dtype)


WAVELET_BACKENDS = {"native": DTCWT, "pytorch_wavelets": LibraryDTCWT}
