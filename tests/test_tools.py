"""The tools as commands, `python -m tools.NAME`."""

import runpy
import sys

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from inputs.image_sets import ImageArrays
from tools import save_images
from tools.draw_architectures import __main__ as draw_architectures
from tools.draw_architectures.palette import SCATTER

TOOLS = [
    "benchmark",
    "draw_architectures",
    "export",
    "generate_token_labels",
    "mutate",
    "reliability",
    "save_images",
    "ship_weights",
    "study",
    "verify_dataset",
    "visualize_filters",
]


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_is_run_as_a_module_leaves_the_path_alone_and_helps_in_eighty_columns(name, monkeypatch, capsys):
    for module in (f"tools.{name}", f"tools.{name}.__main__"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    before = list(sys.path)
    with pytest.raises(SystemExit) as left:
        runpy.run_module(f"tools.{name}", run_name="__main__")
    told = capsys.readouterr().out
    assert left.value.code == 0 and f"usage: python -m tools.{name}" in told
    assert max(map(len, told.splitlines())) <= 80
    assert sys.path == before


def test_images_are_saved_in_folders_of_their_classes_and_nowhere_else(tmp_path, monkeypatch):
    images = np.arange(8, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    names = ("cat", "..", "a/b", "")
    dataset = ImageArrays("MINE/val", images, [0, 1, 2, 3] * 2, names)
    monkeypatch.setattr(save_images, "build_dataset", lambda *args, **kwargs: dataset)
    save_images.main(["--count", "8", "--output", str(tmp_path / "out")])
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.png"))
    folders = ["cat", "_", "a_b", "_"] * 2
    assert [path.as_posix() for path in written] == sorted(f"out/{name}/{i:05d}.png" for i, name in enumerate(folders))
    with Image.open(tmp_path / "out" / "cat" / "00004.png") as image:
        assert image.getpixel((0, 0)) == (4, 4, 4)


def test_the_picture_of_the_architectures_has_its_numbers_from_the_models(tmp_path, monkeypatch):
    names = {"SpectFormer-H": "spectformer_h_b", "SVT-H": "svt_h_b"}
    monkeypatch.setattr(draw_architectures, "VANILLA", "spectformer_ti")
    monkeypatch.setattr(draw_architectures, "PYRAMIDS", names)
    sheet = draw_architectures.draw()
    words = {text.get_text() for text in sheet.axes.texts}
    assert {"4 spectral blocks", "8 attention blocks", "14 × 14 × 256 throughout"} <= words
    assert {"32.5 M parameters", "32.4 M parameters", "28 × 28 × 128", "14 × 14 × 320", "7 × 7 × 512"} <= words
    assert {"spectrum\n56 × 29 × 64", "6 complex bands 28 × 28 × 64"} <= words
    teal = [patch for patch in sheet.axes.patches if to_hex(patch.get_facecolor()) == SCATTER]
    assert len(teal) == 3 + 1 + 1 + 2  # blocks, legend, and in the inset its mark and its two learned parts
