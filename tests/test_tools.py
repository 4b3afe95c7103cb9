"""The tools as commands, `python -m tools.NAME`."""

import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from inputs.images import array_dataset
from tools import save_images

TOOLS = [
    "benchmark",
    "export",
    "generate_token_labels",
    "save_images",
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
    output = capsys.readouterr().out
    assert left.value.code == 0 and f"usage: python -m tools.{name}" in output
    assert max(map(len, output.splitlines())) <= 80
    assert sys.path == before


def test_images_are_saved_in_folders_of_their_classes_and_nowhere_else(tmp_path, monkeypatch):
    images = np.arange(4, dtype=np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    dataset = array_dataset("MINE/val", images, [0, 1, 2, 0], ("cat", "..", "a/b"))
    monkeypatch.setattr(save_images, "build_dataset", lambda *args, **kwargs: dataset)
    save_images.main(["--count", "9", "--output", str(tmp_path / "out")])
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    assert written == ["out/__/00001.png", "out/a_b/00002.png", "out/cat/00000.png", "out/cat/00003.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "cat" / "00003.png"))[..., 0], images[3])
