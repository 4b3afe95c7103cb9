"""The token mixers by name, and which of them stands in which block.

A mixer maps (B, H, W, C) to (B, H, W, C). To add one, write its class and an entry. An entry builds a mixer from
its width, its (height, width) grid and a number of heads, of which it takes what it needs, and the options of its
own. One whose weights depend on the grid is a `GridMixer`.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import nn

from .layers import Attention
from .other_mixers import AFNO, AveragePooling, DepthwiseConv, FNet, FourierOperator
from .resampling import Grid
from .scattering import MIXINGS, ScatteringMixer
from .spectral_gate import SpectralGate

Options = Mapping[str, Mapping[str, object]]  # of a mixer's own, by its name in the table


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
    """The mixer called `name`.

    Raises:
        ValueError: there is none.
        TypeError: it has no such option.
    """
    return MIXERS[check_mixer(name)](dim, grid, num_heads, **options)


def check_mixer(name: str) -> str:
    """The name.

    Raises:
        ValueError: no mixer is called so.
    """
    if name not in MIXERS:
        raise ValueError(f"no mixer is called {name!r}; there are {', '.join(MIXERS)}")
    return name


def check_options(options: Options | None) -> Options:
    """The options, none for None.

    Raises:
        ValueError: they are for a mixer that there is not.
    """
    for name in options or {}:
        check_mixer(name)
    return options or {}


def block_mixers(mixers: str | Sequence[str], depth: int) -> list[str]:
    """The names of the mixers in `depth` blocks: of a list, or of a text like "spectral*4,attention*8".

    Raises:
        ValueError: it is something else, there is no such mixer, or there are more or fewer names than blocks.
    """
    words = mixers.split(",") if isinstance(mixers, str) else mixers
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ValueError(f'mixers are a list of names, or a text like "spectral*4,attention*8", not {mixers!r}')
    counted = [_name_and_count(word) for word in words]
    blocks = sum(count for _, count in counted)
    if blocks != depth:
        raise ValueError(f"mixers {mixers!r} are those of {blocks} blocks, not of {depth}")
    return [name for name, count in counted for _ in range(count)]


def _name_and_count(word: str) -> tuple[str, int]:
    name, times, count = (part.strip() for part in word.partition("*"))
    if times and not count.isdecimal():
        raise ValueError(f"mixers: {word!r} is neither NAME nor NAME*COUNT")
    return check_mixer(name), int(count) if times else 1


def stage_mixers(mixers: str | Sequence[str | Sequence[str]], depths: Sequence[int]) -> list[list[str]]:
    """`block_mixers` for each stage: of a list, or of a text with a slash between stages, "spectral*3/attention*4".

    Raises:
        ValueError: it is something else, there are more or fewer stages, or as `block_mixers`.
    """
    stages = mixers.split("/") if isinstance(mixers, str) else mixers
    if not isinstance(stages, Sequence) or len(stages) != len(depths):
        raise ValueError(f"mixers are {len(depths)} lists, one a stage, or a text with slashes, not {mixers!r}")
    return [block_mixers(stage, depth) for stage, depth in zip(stages, depths, strict=True)]
