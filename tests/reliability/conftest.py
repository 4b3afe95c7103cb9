"""Fixtures of the tests that hold a run to its promises."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import FULL, Launcher
from promises import PROMISES


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "promise(row): the row of docs/reliability.md that a test measures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("promise"):
            item.add_marker(pytest.mark.reliability)


def write_record(entry: dict[str, Any]) -> None:
    path = os.environ.get("RELIABILITY_RECORD")
    if path:
        # One write of one line: several pytest processes append to the file.
        with open(path, "ab", buffering=0) as file:
            file.write((json.dumps(entry) + "\n").encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Record a failure even where the test did not get as far as its figure."""
    report = yield
    marker = item.get_closest_marker("promise")
    if marker and report.failed:
        write_record({"row": marker.args[0], "test": item.nodeid, "failed": str(call.excinfo.value)[:500]})
    return report


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(what, total, failures)``: note a figure for the row of the test's ``promise``, then assert it.

    ``worst``: the largest deviation measured, where the figure is a bound. Every failed case has to be in
    ``failures``, which the assertion shows.
    """
    began = time.perf_counter()
    row = request.node.get_closest_marker("promise").args[0]

    def note(what: str, total: int, failures: list[str], worst: float | None = None) -> None:
        write_record(
            {
                "row": row,
                "promise": PROMISES[row].text,
                "required": PROMISES[row].figure,
                "what": what,
                "measured": total - len(failures),
                "total": total,
                "worst": worst,
                "full": FULL,
                "test": request.node.nodeid,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        assert total > 0, f"nothing was tried: {what}"
        assert not failures, f"{len(failures)} of {total} failed ({what}):\n" + "\n".join(failures[:20])

    return note


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """The fork server: a run of the project in about a second."""
    with Launcher(tmp_path_factory.mktemp("jobs")) as running:
        yield running


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder data set of real images: 32 handwritten digits of four classes to train on, 13 to validate."""
    from PIL import Image
    from sklearn.datasets import load_digits

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
    """The directory of a finished run, with a checkpoint kept of each epoch. Not to be changed."""
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
