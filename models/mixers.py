"""The token mixers by name, and which of them stands in which block.

A mixer maps (B, H, W, C) to (B, H, W, C). To add one, write its class and an entry. An entry builds a mixer from
its width, its (height, width) grid and a number of heads, of which it takes what it needs, and the options of its
own. One whose weights depend on the grid is a `GridMixer`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
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
    check_names([name])
    return MIXERS[name](dim, grid, num_heads, **options)


def check_names(names: Iterable[str]) -> None:
    """See that there are mixers of these names.

    Raises:
        ValueError: there is none of one of them.
    """
    for name in names:
        if name not in MIXERS:
            raise ValueError(f"no mixer is called {name!r}; there are {', '.join(MIXERS)}")


def choose_mixers(
    depths: Sequence[int],
    spectral_depths: Sequence[int] | None,
    default: Sequence[int],
    mixer: str | None,
    mixers: str | Sequence[str | Sequence[str]] | None,
) -> list[list[str]]:
    """The names of the mixers in the blocks of each stage: `mixers`, see `stage_mixers`, or else the papers' choice.

    That is `mixer`, by default "spectral", in the first `spectral_depths` blocks of each stage, `default` for None, and
    attention in the others.

    Raises:
        ValueError: both are given, or the arguments do not fit together.
    """
    if mixers is not None:
        if spectral_depths is not None or mixer is not None:
            raise ValueError("mixers says what each block has: leave out mixer, mixing, alpha and spectral_depths")
        return stage_mixers(mixers, depths)
    spectral_depths = default if spectral_depths is None else spectral_depths
    fits = len(spectral_depths) == len(depths) and all(
        0 <= a <= b for a, b in zip(spectral_depths, depths, strict=True)
    )
    if not fits:
        given = f"spectral_depths {tuple(spectral_depths)} (alpha in a vanilla model)"
        raise ValueError(f"{given} do not fit depths {tuple(depths)}")
    return [
        [mixer or "spectral"] * spectral + ["attention"] * (depth - spectral)
        for spectral, depth in zip(spectral_depths, depths, strict=True)
    ]


def block_mixers(mixers: str | Sequence[str], depth: int) -> list[str]:
    """The names of the mixers in `depth` blocks: of a list, or of a text like "spectral*4,attention*8".

    Raises:
        ValueError: it is something else, there is no such mixer, or there are more or fewer names than blocks.
    """
    words = mixers.split(",") if isinstance(mixers, str) else mixers
    if not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise ValueError(f'mixers are a list of names, or a text like "spectral*4,attention*8", not {mixers!r}')
    names = []
    for word in words:
        name, _, count = word.partition("*")
        if not (count.strip() or "1").isdecimal():
            raise ValueError(f"mixers: {word!r} is neither NAME nor NAME*COUNT")
        names += [name.strip()] * int(count or 1)
    check_names(names)
    if len(names) != depth:
        raise ValueError(f"mixers {mixers!r} are those of {len(names)} blocks, not of {depth}")
    return names


def stage_mixers(mixers: str | Sequence[str | Sequence[str]], depths: Sequence[int]) -> list[list[str]]:
    """`block_mixers` for each stage: of a list, or of a text with a slash between stages, "spectral*3/attention*4".

    Raises:
        ValueError: it is something else, there are more or fewer stages, or as `block_mixers`.
    """
    stages = mixers.split("/") if isinstance(mixers, str) else mixers
    if not isinstance(stages, Sequence) or len(stages) != len(depths):
        raise ValueError(f"mixers are {len(depths)} lists, one a stage, or a text with slashes, not {mixers!r}")
    return [block_mixers(stage, depth) for stage, depth in zip(stages, depths, strict=True)]
