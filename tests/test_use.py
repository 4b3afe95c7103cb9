"""docs/use.md: what it shows runs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.export import FORMATS

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "use.md").read_text(encoding="utf-8")
BLOCKS = {  # each with as many empty lines before it as the page has lines, so that errors name the page's
    f"{section[1]}, {number}": "\n" * PAGE[: section.start(2) + block.start(1)].count("\n") + block[1]
    for section in re.finditer(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    for number, block in enumerate(re.finditer(r"```python\n(.*?)```", section[2], re.S), 1)
}


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the other libraries
@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_the_lines_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "docs/use.md", "exec"), {"__name__": "__main__"})


def test_the_formats_that_are_shown_are_those_that_there_are():
    shown = [shlex.split(line.partition("#")[0]) for line in PAGE.splitlines() if "tools.export CKPT" in line]
    assert {words[words.index("--to") + 1] for words in shown} | {"original"} == set(FORMATS)


@pytest.mark.slow
def test_a_script_in_a_folder_of_its_own_finds_hugging_faces_package(tmp_path):
    script = tmp_path / "mine" / "script.py"
    script.parent.mkdir()
    script.write_text("import datasets\nprint(datasets.load_dataset.__module__)\n")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "datasets.load", done.stderr
