"""What stands where: a row for the model with one grid, a row for the pyramids."""

from collections.abc import Iterable, Mapping
from itertools import groupby

from torch import nn

from models.pyramid import Pyramid, stage_grids
from models.vanilla import Vanilla

from .canvas import FAINT, SLATE, Canvas
from .palette import HEAD, MIXERS, PLAIN, mixer_of
from .signals import flower, pooled

LEFT, RIGHT = 20, 880
SIDE = 76  # of images and tall boxes


def size(*numbers: int) -> str:
    return " × ".join(map(str, numbers))


def colours(blocks: Iterable[nn.Module]) -> list[str]:
    """Of each block's mixer."""
    return [mixer_of(block)[1] for block in blocks]


def millions(model: nn.Module) -> str:
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M parameters"


def heading(sheet: Canvas, top: float, title: str, text: str) -> None:
    sheet.words(LEFT, top - 12, title, 11, ha="left", fontweight="bold")
    sheet.words(RIGHT, top - 13, text, 8, FAINT, ha="right")


def draw_vanilla(sheet: Canvas, name: str, model: Vanilla, top: float) -> None:
    """A vanilla model, 142 high, its upper edge at `top`."""
    bottom = top - 118
    middle, below = bottom + SIDE / 2, bottom - 12
    grid, image = model.grid_size, flower(model.img_size[0])
    heading(
        sheet, top, "SpectFormer", f"one grid: spectral blocks first, attention after  ·  {name}, {millions(model)}"
    )
    sheet.picture(LEFT, bottom, SIDE, SIDE, image, SLATE)
    sheet.words(LEFT + SIDE / 2, below, f"image {size(*model.img_size)}", 7.5, FAINT)
    sheet.arrow((101, middle), (117, middle))
    sheet.box(120, bottom, 64, SIDE, PLAIN, f"patch\nembedding\n{size(*model.patch_embed.proj.kernel_size)}")
    sheet.arrow((187, middle), (203, middle))
    sheet.picture(206, bottom, SIDE, SIDE, pooled(image, grid), SLATE)
    sheet.words(206 + SIDE / 2, below, f"{size(*grid)} tokens", 7.5, FAINT)
    sheet.arrow((285, middle), (301, middle))
    ends = sheet.chips(304, bottom, colours(model.blocks), 27, SIDE, 9)
    first = 0
    for kind, run in groupby(mixer_of(block)[0] for block in model.blocks):
        count = len(list(run))
        sheet.words((ends[first][0] + ends[first + count - 1][1]) / 2, below, f"{count} {kind} blocks")
        first += count
    sheet.words(
        (ends[0][0] + ends[-1][1]) / 2, bottom + SIDE + 10, f"{size(*grid, model.embed_dim)} throughout", 7.5, FAINT
    )
    sheet.arrow((ends[-1][1] + 3, middle), (ends[-1][1] + 19, middle))
    sheet.box(754, bottom, 54, SIDE, PLAIN, "norm,\nmean of\ntokens")
    sheet.arrow((811, middle), (827, middle))
    sheet.box(830, bottom, 50, SIDE, HEAD, f"linear\nhead\n{model.num_classes}")


def draw_pyramids(sheet: Canvas, families: Mapping[str, Pyramid], top: float) -> None:
    """The families of pyramids, a lane each between what they share, 198 high, the upper edge at `top`."""
    model = next(iter(families.values()))
    bottom, lane = top - 168, 34
    middle, below = bottom + SIDE / 2, bottom - 12
    image = flower(model.img_size[0])
    heading(sheet, top, " and ".join(families), "one body of four stages: the grid halves, the width grows")
    sheet.picture(LEFT, bottom, SIDE, SIDE, image, SLATE)
    sheet.words(LEFT + SIDE / 2, below, f"image {size(*model.img_size)}", 7.5, FAINT)
    sheet.arrow((101, middle), (117, middle))
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.stem.modules())
    sheet.box(120, bottom, 52, SIDE, PLAIN, f"stem:\n{convolutions} convo-\nlutions")
    rows = [bottom + SIDE - lane - i * (SIDE - lane) for i in range(len(families))]
    for row, (family, pyramid) in zip(rows, families.items(), strict=True):
        sheet.words(268, row + lane / 2 + 6, family, 8.5, ha="right")
        sheet.words(268, row + lane / 2 - 7, millions(pyramid), 7, FAINT, ha="right")
    sheet.arrow((175, middle), (278, middle))
    x = 282.0
    for i, grid in enumerate(stage_grids(model.img_size, len(model.stages))):
        for row, pyramid in zip(rows, families.values(), strict=True):
            ends = sheet.chips(x, row, colours(pyramid.stages[i].blocks), 20, lane, 5)
        centre, side = (x + ends[-1][1]) / 2, 62 * (grid[0] / 56) ** 0.5
        sheet.picture(centre - side / 2, bottom + SIDE + 9, side, side, pooled(image, grid), SLATE)
        sheet.words(centre, below, size(*grid, model.embed_dims[i]), 7.5, FAINT)
        sheet.words(centre, below - 14, f"stage {i + 1}")
        sheet.arrow((ends[-1][1] + 4, middle), (ends[-1][1] + 21, middle))
        x = ends[-1][1] + 25
    sheet.box(x, bottom, 46, SIDE, PLAIN, "class\nblock")
    sheet.words(x + 23, below - 7, "mean token\nasks the others", 7.5, FAINT)
    sheet.arrow((x + 49, middle), (827, middle))
    sheet.box(830, bottom, 50, SIDE, HEAD, f"linear\nhead\n{model.num_classes}")
    for number, (kind, colour) in enumerate(MIXERS.values()):
        y = top - 44 - number * 16
        sheet.box(x, y - 5, 10, 10, colour)
        sheet.words(x + 16, y, f"{kind} block", 7.5, ha="left")
