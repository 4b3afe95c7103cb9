"""Fixtures of the tests of docs/reliability.md."""

from __future__ import annotations

import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest
from harness import Launcher
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """A run of the project in about a second."""
    here = Path(__file__).parent
    with pytest.MonkeyPatch.context() as environment:  # of the server alone: other tests start processes, too
        environment.setenv("PYTHONPATH", f"{here}:{here.parent.parent}")
        forkserver.ensure_running()
    return Launcher(tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set of real images: 32 handwritten digits of four classes to train on, 13 to validate."""
    root = tmp_path_factory.mktemp("images")
    digits = load_digits(n_class=4)
    for number, (pixels, label) in enumerate(zip(digits.images[:45], digits.target[:45], strict=True)):
        folder = root / ("train" if number < 32 else "val") / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).resize((16, 16)).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture
def flags(images: Path) -> list[str]:
    """The flags of a run of twelve updates, to go before a test's own."""
    return ["--data-set", "FOLDER", "--data-path", str(images)]


@pytest.fixture(scope="session")
def trained(launcher: Launcher, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, with a checkpoint of each epoch. Not to be changed."""
    directory = tmp_path_factory.mktemp("trained") / "run"
    launcher.complete(directory, "--data-set", "FOLDER", "--data-path", str(images), "--checkpoint-epochs", "1")
    return directory


@pytest.fixture(scope="session")
def unfinished(launcher: Launcher, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was stopped in its second epoch. Not to be changed."""
    directory = tmp_path_factory.mktemp("unfinished") / "run"
    stop = ("at", {"event": "updated", "n": 6, "action": "send", "signum": signal.SIGTERM})
    (child,) = launcher.train(directory, "--data-set", "FOLDER", "--data-path", str(images), faults=[stop])
    assert child.wait() == 128 + signal.SIGTERM, child.err
    return directory
