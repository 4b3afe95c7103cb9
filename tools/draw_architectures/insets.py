"""What a spectral block and a scattering block do inside."""

from collections.abc import Sequence

import numpy as np

from models.pyramid import Pyramid
from models.scattering import ScatteringMixer
from models.spectral_gate import SpectralGate

from .canvas import FAINT, SLATE, Canvas, shades
from .palette import GATE, PANEL, PLAIN, SCATTER
from .rows import size
from .signals import flower, gated, pooled, scattered

HEIGHT = 226
SIDE = 56  # of pictures
ORANGE, GREEN = shades("#b35c00"), shades("#0b6a5d")


def panel(sheet: Canvas, x: float, top: float, width: float, colour: str, title: str, text: str) -> None:
    sheet.box(x, top - HEIGHT, width, HEIGHT, PANEL)
    sheet.box(x + 14, top - 24, 11, 11, colour)
    sheet.words(x + 32, top - 18, title, 9.5, ha="left", fontweight="bold")
    sheet.words(x + width - 14, top - 19, text, 7.5, FAINT, ha="right")


def draw_gate(sheet: Canvas, pyramid: Pyramid, x: float, top: float) -> None:
    """The spectral gate of a pyramid's first stage, and the blocks around it; the upper left corner at (x, top)."""
    gate: SpectralGate = pyramid.stages[0].blocks[0].mixer
    grid, dim = gate.grid_size, pyramid.embed_dims[0]
    half_plane = tuple(gate.complex_weight.shape[:2])
    half = SIDE * half_plane[1] / half_plane[0]
    tokens = pooled(flower(pyramid.img_size[0]), grid)
    spectrum, example, after = gated(tokens)

    panel(sheet, x, top, 378, GATE, "Spectral gate", "every token meets all others at once")
    y = top - 106
    middle = y + SIDE / 2
    tokens_at(sheet, x + 18, y, tokens, size(*grid, dim))
    sheet.arrow((x + 77, middle), (x + 122, middle))
    sheet.words(x + 98, middle + 10, "FFT", 7.5)
    sheet.picture(x + 126, y, half, SIDE, spectrum, ORANGE)
    sheet.words(x + 126 + half / 2, y - 18, f"spectrum\n{size(*half_plane, dim)}", 7.5, FAINT)
    sheet.words(x + 126 + half + 22, middle, "⊙", 13)
    sheet.picture(x + 204, y, half, SIDE, example, ORANGE)
    sheet.words(x + 204 + half / 2, y - 18, "complex filter,\nlearned", 7.5, FAINT)
    sheet.arrow((x + 236, middle), (x + 300, middle))
    sheet.words(x + 267, middle + 10, "inverse FFT", 7.5)
    tokens_at(sheet, x + 304, y, after, size(*grid, dim))

    for row, family, feed_forward, sums in ((-174, "SpectFormer", "MLP", [4]), (-204, "pyramids", "FFN", [2, 4])):
        sheet.words(x + 18, top + row, family, 7.5, ha="left")
        draw_block(sheet, x + 92, top + row, ["norm", "gate", "norm", feed_forward], sums)


def tokens_at(sheet: Canvas, x: float, y: float, tokens: np.ndarray, shape: str) -> None:
    sheet.picture(x, y, SIDE, SIDE, tokens, SLATE)
    sheet.words(x + SIDE / 2, y - 18, f"tokens\n{shape}", 7.5, FAINT)


def draw_block(sheet: Canvas, x: float, y: float, parts: Sequence[str], sums: Sequence[int]) -> None:
    """Parts of a block from left to right around the height y; `sums`: after how many a residual is added."""
    sheet.words(x + 6, y, "x", 8, fontstyle="italic")
    x += 23
    begin = x - 7
    for number, part in enumerate(parts, 1):
        sheet.arrow((x - 10, y), (x, y))
        sheet.box(x, y - 8, 40, 16, GATE if part == "gate" else PLAIN, part)
        x += 51
        if number in sums:
            sheet.arrow((x - 10, y), (x - 1, y))
            sheet.words(x + 5, y, "+", 9, fontweight="bold")
            sheet.arrow((begin, y), (begin, y + 14), (x + 5, y + 14), (x + 5, y + 5))
            x += 22
            begin = x - 8


def draw_scattering(sheet: Canvas, pyramid: Pyramid, x: float, top: float) -> None:
    """The scattering mixer of a pyramid's first stage; the upper left corner at (x, top)."""
    mixer: ScatteringMixer = pyramid.stages[0].blocks[0].mixer
    grid, dim = mixer.grid_size, pyramid.embed_dims[0]
    blocks, width = mixer.channel_blend.weight1.shape[1:3]
    tokens = pooled(flower(pyramid.img_size[0]), grid)
    low, bands, after = scattered(tokens)

    panel(sheet, x, top, 466, SCATTER, "Scattering mixer", "where, how fine, and in which direction")
    middle, above, below = top - 118, top - 71, top - 161
    tokens_at(sheet, x + 16, middle - SIDE / 2, tokens, size(*grid, dim))
    sheet.arrow((x + 75, middle), (x + 89, middle))
    draw_transform(sheet, x + 92, middle, "wavelet transform")
    sheet.arrow((x + 117, above), (x + 131, above))
    sheet.arrow((x + 117, below), (x + 131, below))

    sheet.picture(x + 134, above - 26, 52, 52, low, GREEN)
    sheet.words(x + 134, above - 37, f"low-pass {size(*grid, dim)}", 7.5, FAINT, ha="left")
    sheet.words(x + 225, above, "⊙", 13)
    sheet.box(x + 264, above - 22, 88, 44, SCATTER, "learned\nweight", "#ffffff")
    for i, band in enumerate(bands):
        sheet.picture(x + 134 + 36 * (i % 3), below + 1 - 36 * (i // 3), 34, 34, band, GREEN)
    sheet.words(x + 134, below - 46, f"6 complex bands {size(*bands.shape[1:], dim)}", 7.5, FAINT, ha="left")
    sheet.arrow((x + 243, below), (x + 261, below))
    sheet.box(x + 264, below - 30, 88, 60, SCATTER, f"Einstein\nblending in\n{blocks} blocks of {width}", "#ffffff")

    sheet.arrow((x + 355, above), (x + 364, above))
    sheet.arrow((x + 355, below), (x + 364, below))
    draw_transform(sheet, x + 366, middle, "inverse transform")
    sheet.arrow((x + 391, middle), (x + 401, middle))
    sheet.picture(x + 404, middle - 26, 52, 52, after, SLATE)


def draw_transform(sheet: Canvas, x: float, middle: float, name: str) -> None:
    """An upright box with two ways in or out."""
    sheet.box(x, middle - 78, 22, 156, PLAIN)
    sheet.words(x + 11, middle, name, 7.5, rotation=90)
