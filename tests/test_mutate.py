"""Planted faults: what is planted, what is taken over from an earlier run, what is told of them."""

import ast
import json

import yaml

from tools import reliability
from tools.mutate.__main__ import EQUIVALENT, ROOT, TESTS
from tools.mutate.faults import draw, faults_of, planted
from tools.mutate.report import as_figures, holds, outcome
from tools.mutate.trials import Trials

MODULE = """
def clamp(x, low=0, high=9):
    if x < low and not x > high:
        raise ValueError("too low")
    print(low, high)
    return max(low, x - 1)
"""
TEST = "def helper():\n    return 1\n\ndef test_it():\n    assert helper()\n"


def project(folder, module=MODULE, test=TEST):
    (folder / "module.py").write_text(module)
    (folder / "test_module.py").write_text(test)
    return folder


def test_every_fault_is_a_change_of_its_own_and_has_a_name_of_its_own(tmp_path):
    project(tmp_path)
    faults = faults_of("module.py", tmp_path)
    sources = {planted(fault, tmp_path) for fault in faults}
    assert len(sources | {ast.unparse(ast.parse(MODULE))}) == len(faults) + 1
    assert len({fault.name for fault in faults}) == len(faults)
    changes = {fault.change for fault in faults}
    assert {"x < low -> x >= low", "x < low -> x <= low", "9 -> 10", "print(low, high) -> pass"} <= changes


def test_a_changed_module_leaves_the_faults_of_the_others_drawn(tmp_path):
    names = [f"{letter}.py" for letter in "abc"]
    for name in names:
        (tmp_path / name).write_text(MODULE)
    before = draw(30, 0, names, tmp_path)
    (tmp_path / "a.py").write_text("x = 1\n")
    after = draw(30, 0, names, tmp_path)
    assert {fault for fault in before if fault.module != "a.py"} <= set(after)
    assert draw(30, 1, names, tmp_path) != after


def test_what_was_found_holds_while_the_module_and_the_test_are_the_same(tmp_path):
    fault = faults_of("module.py", project(tmp_path))[0]
    found = outcome(fault, "test_module.py::test_it[case]", tmp_path)
    assert not holds(fault, None, tmp_path)
    assert holds(fault, found, project(tmp_path, test=TEST + "\ndef test_more():\n    pass\n"))
    assert not holds(fault, found, project(tmp_path, test=TEST.replace("assert helper()", "assert not helper()")))
    assert not holds(fault, found, project(tmp_path, module=MODULE + "\nmore = 1\n"))


def test_a_fault_is_tried_in_a_copy_by_the_tests_of_its_module(tmp_path):
    """A failing test is named, a file that cannot be imported too; a fault that all of them pass survives."""
    root, module = (
        tmp_path / "project",
        "START = 0\n\ndef twice(x):\n    return 2 * x\n\ndef more(x):\n    return x + 1\n",
    )
    (root / "tests").mkdir(parents=True)
    (root / "module.py").write_text(module)
    (root / "pyproject.toml").write_text('[tool.pytest.ini_options]\npythonpath = ["."]\n')
    file = root / "tests" / "test_module.py"
    # An extension module, of an environment that may lie in the project's folder, is not imported a second time.
    imports = "import torch\nfrom module import START, twice\n"
    file.write_text(f"{imports}assert START == 0\ndef test_it():\n    assert twice(3) == 6\n")
    (tmp_path / "scratch").mkdir()
    trials = Trials(root, tmp_path / "scratch")
    found = {fault.change: trials.run(["module"], fault) for fault in faults_of("module.py", root)}
    assert {change for change, test in found.items() if not test} == {
        "return x + 1 -> return None",
        "x + 1 -> x - 1",
        "1 -> 2",
    }
    assert found["0 -> 1"] == "tests/test_module.py" and found["2 -> 3"] == "tests/test_module.py::test_it"
    assert (root / "module.py").read_text() == module


def test_the_page_tells_how_many_were_caught_and_why_the_others_were_not(tmp_path, monkeypatch):
    faults = faults_of("module.py", project(tmp_path))[:6]
    caught = {fault: outcome(fault, "test_module.py::test_it", tmp_path) for fault in faults[:4]}
    missed = {fault: outcome(fault, "", tmp_path) for fault in faults[4:]}
    equivalent = {faults[4].name: "it is never asked"}
    figures = as_figures(caught | missed, equivalent, {"module.py": ["module"]}, seed=3)
    monkeypatch.setattr(reliability, "PLANTED_FAULTS", tmp_path / "figures.json")
    reliability.PLANTED_FAULTS.write_text(json.dumps(figures))
    page, _ = reliability.document([], "command", 60.0, "ended")
    assert (
        "planted 6 faults (seed 3, " in page and "**4 of the 5 that a test could notice were caught, 80.0 %**" in page
    )
    assert "| module.py | 4 | 1 | 1 | test_module.py |" in page
    assert f"- `{faults[4].name}`: it is never asked" in page and f"- `{faults[5].name}`: **survived**" in page


def test_the_modules_their_tests_and_the_faults_that_cannot_be_noticed_exist():
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for names in TESTS.values() for name in names)
    reasons = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or {}
    modules = {name.partition(" ")[0] for name in reasons}
    assert reasons.keys() <= {fault.name for module in modules for fault in faults_of(module, ROOT)}
