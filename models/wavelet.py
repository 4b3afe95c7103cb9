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
    """(size, size) float64 matrix that filters `size` samples extended half-sample symmetrically."""
    half = len(taps) // 2
    place = torch.arange(size)[:, None] + torch.arange(-half, half + 1)
    place = place % (2 * size)
    place = torch.where(place < size, place, 2 * size - 1 - place)
    values = torch.tensor(taps, dtype=torch.float64).expand(size, -1)
    return torch.zeros(size, size, dtype=torch.float64).scatter_add(1, place, values)


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


MATRICES = {"analysis": analysis_matrix, "synthesis": synthesis_matrix}


# Of a grid filtered along both axes, 16 phases: low even, low odd, high even, high odd rows by the same columns.
# Each of the images lh, hh, hl has four, a b over c d, the pixels of its 2x2 squares, and becomes two bands.
_IMAGES = (((8, 9, 12, 13), (0, 5)), ((10, 11, 14, 15), (1, 4)), ((2, 3, 6, 7), (2, 3)))
LOW_PHASES = (0, 1, 4, 5)

Sums = dict[int, tuple[Callable[..., Tensor], int, int]]


def _sums() -> tuple[Sums, Sums]:
    """What to add or subtract for the planes of the bands (6 real, 6 imaginary) and, back, for the phases."""
    planes: Sums = {}
    phases: Sums = {}
    for (a, b, c, d), (one, other) in _IMAGES:
        planes |= {one: (torch.sub, a, d), 6 + one: (torch.add, b, c)}
        planes |= {other: (torch.add, a, d), 6 + other: (torch.sub, b, c)}
        phases |= {a: (torch.add, one, other), d: (torch.sub, other, one)}
        phases |= {b: (torch.add, 6 + one, 6 + other), c: (torch.sub, 6 + one, 6 + other)}
    return dict(sorted(planes.items())), dict(sorted(phases.items()))


PLANES_OF_PHASES, PHASES_OF_PLANES = _sums()


def multiply(matrix: Tensor, x: Tensor, dim: int) -> Tensor:
    """(n, m) matrix times dim 1 or 2, of m entries, of (B, H, W, C): batched products without copies."""
    batch = x.flatten(2) if dim == 1 else x.flatten(0, 1)
    product = torch.bmm(matrix.expand(len(batch), -1, -1), batch)
    return product.unflatten(2, x.shape[2:]) if dim == 1 else product.unflatten(0, x.shape[:2])


def phases_of(filtered: Tensor) -> list[Tensor]:
    """The 16 phases (B, H/2, W/2, C) of a grid (B, 2H, 2W, C) filtered along both axes, as views."""
    rows = filtered.unflatten(1, (4, -1)).unbind(1)
    return [phase for row in rows for phase in row.unflatten(2, (4, -1)).unbind(2)]


def phases_of_image(image: Tensor) -> list[Tensor]:
    """The upper left, upper right, lower left, lower right pixels of all 2x2 squares, as views."""
    return [phase for row in image.unflatten(1, (-1, 2)).unbind(2) for phase in row.unflatten(2, (-1, 2)).unbind(3)]


def in_order_of_phase(image: Tensor) -> Tensor:
    """(H, W, C) with its even rows before its odd ones, and its even columns before its odd ones."""
    return image.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).permute(1, 0, 3, 2, 4).reshape(image.shape)


def _to_bands(filtered: Tensor) -> tuple[Tensor, Tensor]:
    """A grid (B, 2H, 2W, C) filtered along both axes as low-pass image and bands (2, 6, B, H/2, W/2, C)."""
    phases = phases_of(filtered)
    a, b, c, d = (phases[i] for i in LOW_PHASES)
    low = torch.stack((torch.stack((a, b), 3), torch.stack((c, d), 3)), 2).flatten(3, 4).flatten(1, 2)
    planes = [operation(phases[i], phases[j]) for operation, i, j in PLANES_OF_PHASES.values()]
    return math.sqrt(2) * low, torch.stack(planes).unflatten(0, (2, 6))


def _from_bands(low: Tensor, bands: Tensor) -> Tensor:
    """The transpose of `_to_bands`, which undoes it up to a factor of 2."""
    planes = bands.flatten(0, 1).unbind()
    phases = dict(zip(LOW_PHASES, phases_of_image(math.sqrt(2) * low), strict=True))
    phases |= {k: operation(planes[i], planes[j]) for k, (operation, i, j) in PHASES_OF_PLANES.items()}
    return torch.cat([torch.cat([phases[4 * row + i] for i in range(4)], 2) for row in range(4)], 1)


class DTCWT(nn.Module):
    """Level-1 dual-tree complex wavelet transform of (B, H, W, C), and its inverse.

    `forward` gives the low-pass image (B, H', W', C), H' and W' being H and W rounded up to even, and six
    complex bands (2, 6, B, H'/2, W'/2, C), real part first, oriented at 15, 45, 75, 105, 135, 165 degrees.
    `inverse` reconstructs the signal exactly. Both compute in float32 with autocast off (in float64 for
    float64) and return the input's dtype. Any grid is accepted; that of construction has its matrices ready.
    """

    def __init__(self, grid_size: Grid):
        super().__init__()
        self._set_matrices(grid_size)

    def _set_matrices(self, grid_size: Grid, device: torch.device | None = None) -> None:
        self.grid_size = grid_size
        for axis, size in enumerate(grid_size):
            for name, build in MATRICES.items():
                matrix = build(size).to(device, torch.float32)
                self.register_buffer(f"{name}{axis}", matrix, persistent=False)

    def set_grid_size(self, grid_size: Grid) -> None:
        """Prepare the matrices of another (H, W)."""
        self._set_matrices(grid_size, self.analysis0.device)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # A cast to half precision, or materialising from the meta device, must not change the filters.
        self._set_matrices(self.grid_size, self.analysis0.device)
        return self

    def matrices(self, name: str, grid: Grid, like: Tensor) -> tuple[Tensor, Tensor]:
        """Those that filter the columns and the rows of a grid, in the dtype of `like`."""
        if grid == self.grid_size and like.dtype == torch.float32:
            return getattr(self, f"{name}0"), getattr(self, f"{name}1")
        rows, columns = (MATRICES[name](size).to(like) for size in grid)
        return rows, columns

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with autocast_off(x):
            signal = full_precision(x)
            rows, columns = self.matrices("analysis", (x.shape[1], x.shape[2]), signal)
            low, bands = _to_bands(multiply(rows, multiply(columns, signal, 2), 1))
            return low.to(x.dtype), bands.to(x.dtype)

    def inverse(self, low: Tensor, bands: Tensor, grid: Grid) -> Tensor:
        """The (B, H, W, C) signal of a low-pass image and its bands; `grid` = (H, W), which may be odd."""
        with autocast_off(low):
            image = full_precision(low)
            rows, columns = self.matrices("synthesis", grid, image)
            filtered = _from_bands(image, full_precision(bands))
            return multiply(columns, multiply(rows, filtered, 1), 2).to(low.dtype)


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
