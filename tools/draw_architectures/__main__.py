"""Draw both architectures and what their spectral layers do, with the numbers of the models themselves.

python -m tools.draw_architectures --output docs/architectures.png
"""

from collections.abc import Sequence
from pathlib import Path

import timm

import models  # noqa: F401 (registers them)
from inference.figures import save_figure
from runtime.entry_point import run_cli
from tools.command_line import ToolParser
from utils import make_directory

from .canvas import Canvas
from .insets import draw_gate, draw_scattering
from .rows import draw_pyramids, draw_vanilla

VANILLA = "spectformer_xs"
PYRAMIDS = {"SpectFormer-H": "spectformer_h_s", "SVT-H": "svt_h_s"}


def draw() -> Canvas:
    """The whole picture, 900 pixels wide."""
    sheet = Canvas(900, 620)
    families = {family: timm.create_model(name) for family, name in PYRAMIDS.items()}
    draw_vanilla(sheet, VANILLA, timm.create_model(VANILLA), 614)
    draw_pyramids(sheet, families, 458)
    draw_gate(sheet, families["SpectFormer-H"], 20, 236)
    draw_scattering(sheet, families["SVT-H"], 414, 236)
    return sheet


def main(argv: Sequence[str] | None = None) -> None:
    parser = ToolParser("draw_architectures", __doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/architectures.png"), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    make_directory(args.output.parent)
    save_figure(args.output, draw().figure)
    print(args.output)


if __name__ == "__main__":
    run_cli(main)
