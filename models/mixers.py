"""The table of token mixers, and the choice of a mixer for every block.

A mixer maps (B, H, W, C) to (B, H, W, C). To add one, write its class and an entry in `MIXERS`: a function of the
width, the (height, width) grid and the number of heads, which it may ignore, and of the mixer's own options. Derive
the class from `GridMixer` if its weights depend on the grid.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from torch import nn

from .layers import Attention
from .other_mixers import AFNO, AveragePooling, DepthwiseConv, FNet, FourierOperator
from .resampling import Grid
from .scattering import MIXINGS, ScatteringMixer
from .spectral_gate import SpectralGate

Options = Mapping[str, Mapping[str, object]]  # mixer name -> the mixer's own options


def _scattering(mixing: str, dim: int, grid: Grid, _num_heads: int, **options: str) -> nn.Module:
    return ScatteringMixer(dim, grid, mixing, **options)


MIXERS: dict[str, Callable[..., nn.Module]] = {
    "attention": lambda dim, _grid, num_heads: Attention(dim, num_heads),
    "spectral": lambda dim, grid, _num_heads: SpectralGate(dim, grid),
    **{f"scattering_{mixing}": partial(_scattering, mixing) for mixing in MIXINGS},
    "fnet": lambda _dim, _grid, _num_heads, **options: FNet(**options),
    "fno": lambda dim, _grid, _num_heads: FourierOperator(dim),
    "afno": lambda dim, _grid, _num_heads, **options: AFNO(dim, **options),
    "conv": lambda dim, _grid, _num_heads, **options: DepthwiseConv(dim, **options),
    "pool": lambda _dim, _grid, _num_heads: AveragePooling(),
    "none": lambda _dim, _grid, _num_heads: nn.Identity(),
}


def build_mixer(name: str, dim: int, grid: Grid, num_heads: int, **options: object) -> nn.Module:
    """Build the mixer called `name`.

    Raises:
        ValueError: if no mixer has this name.
        TypeError: if the mixer has no such option.
    """
    check_names([name])
    return MIXERS[name](dim, grid, num_heads, **options)


def check_names(names: Iterable[str]) -> None:
    """Check that all mixer names exist.

    Raises:
        ValueError: if one of them does not.
    """
    for name in names:
        if name not in MIXERS:
            raise ValueError(f"no mixer is called {name!r}; choose from {', '.join(MIXERS)}")


def choose_mixers(
    depths: Sequence[int],
    spectral_depths: Sequence[int] | None,
    default: Sequence[int],
    mixer: str | None,
    mixers: str | Sequence[str | Sequence[str]] | None,
) -> list[list[str]]:
    """Return the names of the mixers in each stage's blocks, from `mixers` if given, see `stage_mixers`.

    Otherwise, the first `spectral_depths` blocks of each stage (None for `default`) use `mixer`, by default "spectral",
    and the remaining blocks use attention.

    Raises:
        ValueError: if both ways are mixed, or the arguments are inconsistent.
    """
    if mixers is not None:
        if spectral_depths is not None or mixer is not None:
            raise ValueError("mixers sets every block's mixer: leave out mixer, mixing, alpha and spectral_depths")
        return stage_mixers(mixers, depths)
    spectral_depths = default if spectral_depths is None else spectral_depths
    both = list(zip(spectral_depths, depths, strict=False))
    if len(spectral_depths) != len(depths) or not all(0 <= spectral <= depth for spectral, depth in both):
        given = f"spectral_depths {tuple(spectral_depths)} (alpha in a vanilla model)"
        raise ValueError(f"{given} do not fit depths {tuple(depths)}")
    return [[mixer or "spectral"] * spectral + ["attention"] * (depth - spectral) for spectral, depth in both]


def block_mixers(mixers: str | Sequence[str], depth: int) -> list[str]:
    """Return the mixer names of `depth` blocks, given as a list or as a string such as "spectral*4,attention*8".

    Raises:
        ValueError: if the value is malformed, a mixer is unknown, or the number of names is not `depth`.
    """
    words = mixers.split(",") if isinstance(mixers, str) else mixers
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ValueError(f'mixers must be a list of names or a string like "spectral*4,attention*8", not {mixers!r}')
    names = []
    for word in words:
        name, _, count = word.partition("*")
        if not (count.strip() or "1").isdecimal():
            raise ValueError(f"mixers: {word!r} is neither NAME nor NAME*COUNT")
        names += [name.strip()] * int(count or 1)
    check_names(names)
    if len(names) != depth:
        raise ValueError(f"mixers {mixers!r} name {len(names)} blocks, but there are {depth}")
    return names


def stage_mixers(mixers: str | Sequence[str | Sequence[str]], depths: Sequence[int]) -> list[list[str]]:
    """Apply `block_mixers` to each stage of a list, or of a string with slashes, "spectral*3/attention*4".

    Raises:
        ValueError: if the value is malformed or has another number of stages; see also `block_mixers`.
    """
    stages = mixers.split("/") if isinstance(mixers, str) else mixers
    if not isinstance(stages, Sequence) or len(stages) != len(depths):
        raise ValueError(f"mixers must be {len(depths)} lists, one per stage, or a string with slashes, not {mixers!r}")
    return [block_mixers(stage, depth) for stage, depth in zip(stages, depths, strict=True)]
