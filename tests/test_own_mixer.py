"""--mixer-module: a mixer of the user's own, as CONTRIBUTING.md shows it, is trained and used."""

import re
from pathlib import Path

import pytest
from PIL import Image
from tiny_runs import DIGITS, train

import infer
from models.mixers import MIXERS
from utils import UserError

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
KWARGS = ["--model-kwargs", "embed_dim=32", "depth=2", "num_heads=2"]


@pytest.fixture
def module(tmp_path):
    (tmp_path / "mine.py").write_text(re.search(r"```python\n(# mine\.py.*?)```", PAGE, re.S)[1])
    yield tmp_path / "mine.py"
    MIXERS.pop("shift", None)


@pytest.mark.slow
def test_a_mixer_of_ones_own_is_trained_and_used_by_naming_its_file(module, tmp_path, capsys):
    own = ["--mixer-module", str(module), "--mixers", "shift,attention"]
    rows = train(tmp_path / "run", *own, "--epochs", "1", model=[*DIGITS, "--arch", "spectformer-ti", *KWARGS])
    assert rows[0]["train_loss"] > 0
    Image.new("L", (32, 32)).save(tmp_path / "digit.png")
    words = ["--model-path", str(tmp_path / "run"), "--image", str(tmp_path / "digit.png"), "--num-workers", "0"]
    infer.main(["--mixer-module", str(module), *words])
    assert "digit.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "expected"), [(None, "No such file"), ("import nowhere_at_all", "ModuleNotFoundError: .*nowhere")]
)
def test_a_module_that_cannot_be_imported_is_named_in_one_line(tmp_path, text, expected):
    if text:
        (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=rf"--mixer-module.*mine\.py: .*{expected}") as caught:
        train(tmp_path / "run", "--mixer-module", str(tmp_path / "mine.py"))
    assert "\n" not in str(caught.value)
