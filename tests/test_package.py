"""The models as the package that `pip install .` creates."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
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
    """Build the wheel from a copy, to leave no files in the working tree."""
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
    """Return the Python of a new environment with the wheel, and torch and timm of the current environment."""
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
def test_the_wheel_has_every_source_file_the_type_marker_and_the_weights_and_needs_torch_and_timm_alone(wheel):
    folder = ROOT / "models"
    files = [*folder.rglob("*.py"), *folder.rglob("*.safetensors")]
    tracked = {path.relative_to(folder).as_posix() for path in files}
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        fields = message_from_bytes(archive.read(metadata))
    contained = {name.removeprefix(f"{NAME}/") for name in names if name.startswith(f"{NAME}/")}
    assert contained == tracked | {"py.typed"} and "weights/svt_h_n.cifar10.safetensors" in contained
    assert {name.partition("/")[0] for name in names} == {NAME, metadata.partition("/")[0]}
    assert (fields["Name"], fields["License-Expression"]) == ("spectformer-svt", "MIT")
    assert sorted(line.split(">")[0] for line in fields.get_all("Requires-Dist")) == ["timm", "torch"]


@pytest.mark.slow
def test_installed_it_registers_the_models_beside_another_projects_models_and_runs_its_scripts(environment, tmp_path):
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
    script = "import sys, timm, models\nprint(__name__, models.mine, sys.argv[1:], timm.is_model('spectformer_xs'))\n"
    (tmp_path / "train.py").write_text(script)
    flags = ["-m", NAME, str(tmp_path / "train.py"), "--model", "spectformer_xs"]
    assert run(environment, None, cwd="/", flags=flags) == "__main__ True ['--model', 'spectformer_xs'] True\n"


def test_a_script_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [NAME, "nope.py"])
    with pytest.raises(SystemExit, match="2"):
        registering.main()
    assert capsys.readouterr().err == "error: nope.py: no such script\n"
