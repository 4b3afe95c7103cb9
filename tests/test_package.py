"""The models as a package of their own name, as `pip install .` makes it."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from contextlib import nullcontext
from email import message_from_bytes
from pathlib import Path

import pytest
import timm

from models import __main__ as registering

ROOT = Path(__file__).resolve().parent.parent
NAME = "spectformer_svt"
BUILT = ("pyproject.toml", "README.md", "LICENSE", "models")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built of a copy, so that nothing is left in the working tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in BUILT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target)]
    subprocess.run([*pip, *options, str(source)], check=True, capture_output=True, text=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """The Python of an empty environment with the wheel; torch and timm are lent to it by this one."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    (site,) = place.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(site), str(wheel)], check=True, capture_output=True)
    (site / "borrowed.pth").write_text(f"{Path(timm.__file__).parents[1]}\n")
    return python


def run(python, code, *, cwd, flags=()):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), *(["-c", code] if code else []), *flags]
    done = subprocess.run(command, cwd=cwd, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_every_source_file_the_type_marker_and_the_weights(wheel):
    folder = ROOT / "models"
    files = [*folder.rglob("*.py"), *folder.rglob("*.safetensors")]
    tracked = {path.relative_to(folder).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as archive:
        held = {name.removeprefix(f"{NAME}/") for name in archive.namelist() if name.startswith(f"{NAME}/")}
        others = {name.partition("/")[0] for name in archive.namelist()} - {NAME}
    assert held == tracked | {"py.typed"}
    assert "weights/svt_h_n.cifar10.safetensors" in held
    assert [name.endswith(".dist-info") for name in others] == [True]


def test_the_wheel_says_what_it_is_and_needs_torch_and_timm_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        told = message_from_bytes(archive.read(metadata))
    assert (told["Name"], told["License-Expression"]) == ("spectformer-svt", "MIT")
    needed = sorted(line.split(">")[0] for line in told.get_all("Requires-Dist"))
    assert needed == ["timm", "torch"]


@pytest.mark.slow
def test_installed_it_registers_the_models_beside_another_projects_models(environment, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("mine = True\n")
    code = f"""
import sys, torch, timm, {NAME}, models
assert models.mine
model = timm.create_model("svt_h_s", num_classes=3, img_size=64).eval()
assert type(model).__module__.startswith("{NAME}.")
assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
trained = timm.create_model("spectformer_h_n", pretrained=True)
assert trained.pretrained_cfg["label_names"][3] == "cat"
ours = ("datasets", "engine", "inference", "inputs", "runtime", "training", "utils")
assert not [name for name in ours if name in sys.modules], sys.modules
"""
    run(environment, code, cwd=tmp_path)


@pytest.mark.slow
def test_a_script_of_another_project_is_run_with_the_models_registered(environment, tmp_path):
    (tmp_path / "neighbour.py").write_text("greeting = 'hello'\n")
    script = "import sys, timm, neighbour\nprint(__name__, sys.argv[1:], timm.is_model('spectformer_xs'))\n"
    (tmp_path / "train.py").write_text(script)
    told = run(environment, None, cwd="/", flags=["-m", NAME, str(tmp_path / "train.py"), "--model", "spectformer_xs"])
    assert told == "__main__ ['--model', 'spectformer_xs'] True\n"


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [([], 2, "Run a script"), (["nope.py"], 2, "error: nope.py: no such script\n"), (["--help"], None, "Run a script")],
    ids=["nothing", "no file", "help"],
)
def test_what_there_is_to_run_is_asked_for(words, code, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [NAME, *words])
    with nullcontext() if code is None else pytest.raises(SystemExit) as left:
        registering.main()
    assert code is None or left.value.code == code
    out, err = capsys.readouterr()
    assert (err if code else out).startswith(told) and not (out if code else err)
    assert max(map(len, (out + err).splitlines())) <= 80
