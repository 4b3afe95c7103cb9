"""Studies: equal terms for every cell, going on after a kill, results and page."""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from tiny_runs import assert_same, last

from engine import start
from tools.study import __main__ as study_tool
from tools.study.cell import Cell
from tools.study.definition import read_study
from tools.study.results import read_lines
from tools.study.summary import Summary, compare, equal, residual_deviation
from training.classification import Classification
from training.options import parse_args
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "title": "Tiny",
    "data": "Two digits",
    "seeds": 2,
    "against": "alpha",
    "recipe": {
        "arch": "spectformer_ti",
        "model-kwargs": {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8},
        "data-set": "DIGITS",
        "classes": "0,7",
        "train-part": 0.5,
        "input-size": 32,
        "batch-size": 16,
        "epochs": 1,
        "warmup-epochs": 0,
        "aa": "none",
        "num-workers": 0,
        "checkpoint-steps": 1,
    },
    "cells": {"alpha 1": {"alpha": 1}, "convolution, pooling": {"mixers": "conv,pool"}},
}
MEASURED = ("seconds", "finished")


def written(path, **changes):
    path.write_text(yaml.safe_dump(TINY | changes))
    return path


def words(folder, study, workers):
    return [str(study), "--page", str(folder / "page.md"), "--runs", str(folder / "runs"), "--workers", str(workers)]


def results(folder):
    lines = read_lines(folder / "page" / "tiny.jsonl")
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def weights(folder):
    return {path.name: last(path)["model"] for path in sorted((folder / "runs" / "tiny").iterdir()) if path.is_dir()}


def wait_for(found, process):
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def test_a_study_killed_between_and_within_its_runs_ends_with_the_same_bits_in_any_order(tmp_path, capsys):
    study = written(tmp_path / "tiny.yaml")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    study_tool.main(words(whole, study, workers=2))
    page = (whole / "page.md").read_text()
    assert "| alpha 1 | " in page and "![Tiny: accuracy against alpha](page/tiny_alpha.png)" in page
    for picture in ("alpha", "speed"):
        assert (whole / "page" / f"tiny_{picture}.png").read_bytes().startswith(b"\x89PNG")

    def begun():
        process = subprocess.Popen([sys.executable, "-m", "tools.study", *words(killed, study, workers=1)], cwd=ROOT)
        return process, lambda: len(results(killed)), lambda: list(killed.glob("runs/tiny/*/checkpoint_last.pth"))

    process, ended, _ = begun()
    wait_for(ended, process)
    process.kill()
    process.wait()
    process, _, saved = begun()
    wait_for(lambda: len(saved()) > ended(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    assert 0 < ended() < 4
    study_tool.main(words(killed, study, workers=2))
    assert results(killed) == results(whole) and len(results(whole)) == 4
    assert_same(weights(killed), weights(whole))
    assert "4 of 4 runs" in capsys.readouterr().out


def initial_weights(study, cell, seed, folder):
    args = parse_args(Classification.flags, study.command(cell, seed, folder, "cpu")[2:])
    with start(Cell, args) as run:
        return Cell(run).model.state_dict()


def test_cells_of_a_seed_begin_with_the_same_weights_but_for_their_mixers(tmp_path):
    study = read_study(written(tmp_path / "tiny.yaml"))
    ours, other, next_seed = (
        initial_weights(study, cell, seed, tmp_path / "unused")
        for cell, seed in (("alpha 1", 0), ("convolution, pooling", 0), ("alpha 1", 1))
    )
    shared = {name for name in ours if ".mixer." not in name}
    assert shared == {name for name in other if ".mixer." not in name} and len(shared) < len(ours)
    assert_same(*({name: weights[name] for name in shared} for weights in (ours, other)))
    assert not torch.equal(ours["pos_embed"], next_seed["pos_embed"])


@pytest.mark.parametrize(
    ("changes", "flags", "expected"),
    [
        ({"cels": {}}, [], "unknown key 'cels'; did you mean cells"),
        ({"seeds": 0}, [], "seeds is missing"),
        ({"seeds": -1}, [], "seeds counts the runs of a cell"),
        ({"seeds": "three"}, [], "seeds has to be int"),
        ({"cells": {}}, [], "cells is missing"),
        ({"cells": {"a": 3}}, [], "'a' has to be a name with a mapping"),
        ({"cells": {"a": {"alpha": 9}}}, [], "cells: a: .*0 to the depth 2"),
        ({"cells": {"a": {"mixers": "conv,pol"}}}, [], "cells: a: .*no mixer is called 'pol'"),
        ({"recipe": {"epoch": 3}}, [], "recipe: unknown key 'epoch'; did you mean epochs"),
        ({"recipe": {"epochs": "many"}}, [], "recipe: .*--epochs.*many"),
        ({"recipe": {"seed": 3}}, [], "--seed is what the study sets itself"),
        ({"recipe": {"arch": "deit_tiny_patch16_224"}}, [], "cells: alpha 1: .*deit_tiny"),
        ({}, ["--epoch", "3"], "unknown argument --epoch; did you mean --epochs"),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value)[:40],
)
def test_a_mistake_in_a_study_is_one_line_that_names_it(tmp_path, changes, flags, expected):
    with pytest.raises(UserError, match=expected) as caught:
        read_study(written(tmp_path / "tiny.yaml", **changes), flags)
    assert "\n" not in str(caught.value)


def a_line(study, cell, seed=0, **changes):
    numbers = dict.fromkeys(("acc1", "acc5", "loss", "parameters", "gflops", "seconds"), 1.0)
    numbers |= {"images": 64, "test_images": 8, "classes": 2}
    words = {"machine": "an abacus", "torch": torch.__version__, "timm": timm.__version__}
    return {"cell": cell, "seed": seed, "recipe": study.recipe(cell)} | numbers | words | changes


def folder_with_lines(tmp_path, lines):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "tiny.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return words(tmp_path, tmp_path / "tiny.yaml", workers=1)


def test_results_of_another_recipe_are_not_taken_for_this_ones(tmp_path):
    study = read_study(written(tmp_path / "tiny.yaml"))
    command = folder_with_lines(tmp_path, [a_line(study, "alpha 1")])
    with pytest.raises(UserError, match="alpha 1, seed 0 was trained with another recipe: .*epochs.*1.*2"):
        study_tool.main([*command, "--page-only", "--epochs", "2"])


def test_a_page_is_written_of_what_there_is_and_keeps_what_stands_around_a_study(tmp_path):
    study = read_study(written(tmp_path / "tiny.yaml"))
    command = folder_with_lines(tmp_path, [a_line(study, "alpha 1", acc1=71.5)])
    (tmp_path / "page.md").write_text("# Studies\n\nBefore.\n")
    study_tool.main([*command, "--page-only"])
    (tmp_path / "page.md").write_text((tmp_path / "page.md").read_text() + "\nWhat it means.\n")
    study_tool.main([*command, "--page-only"])
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("# Studies\n\nBefore.\n") and page.endswith("\nWhat it means.\n")
    assert page.count("## Tiny") == 1 and "71.50" in page and "Not finished: 1 of 4 runs" in page
    assert "no two cells can be told apart" in page


def test_a_run_that_fails_ends_the_study_with_its_words_and_its_code(tmp_path):
    command = words(tmp_path, written(tmp_path / "tiny.yaml"), workers=1)
    with pytest.raises(study_tool.RunFailed, match="alpha 1, seed 0: .*--data-path.*no such folder") as caught:
        study_tool.main([*command, "--data-set", "FOLDER", "--data-path", str(tmp_path / "nowhere")])
    assert caught.value.exit_code == 2


def test_cells_are_told_apart_seed_by_seed():
    one, other = Summary("a", {0: 50.0, 1: 60.0, 2: 40.0}, {}), Summary("b", {0: 53.0, 1: 62.0, 2: 44.5}, {})
    deviation = residual_deviation([one, other])
    differences = [3.0, 2.0, 4.5]  # of two cells it is the error of the paired differences
    expected = (-statistics.fmean(differences), 2 * statistics.stdev(differences) / 3**0.5)
    assert compare(one, other, deviation) == pytest.approx(expected)
    assert not equal(one, other, deviation) and not equal(other, one, deviation)
    moved = [Summary(cell.cell, {s: a + 7 * s for s, a in cell.by_seed.items()}, {}) for cell in (one, other)]
    assert residual_deviation(moved) == pytest.approx(deviation)  # a seed that moves every cell tells nothing
    assert equal(one, Summary("", {0: 52.0, 1: 58.0, 2: 40.5}, {}), deviation)


def test_seeds_that_a_cell_lacks_are_not_compared():
    whole = [Summary("a", {0: 50.0, 1: 60.0, 2: 40.0}, {}), Summary("b", {0: 53.0, 1: 62.0, 2: 44.5}, {})]
    more = [Summary("a", {**whole[0].by_seed, 3: 10.0}, {}), whole[1]]
    assert residual_deviation(more) == residual_deviation(whole) and not equal(*more, residual_deviation(more))
    assert compare(*more, 1.0) == compare(*whole, 1.0)
    lonely = Summary("a", {0: 50.0}, {}), Summary("b", {0: 90.0}, {})
    assert equal(*lonely, residual_deviation(lonely))  # nothing to tell them apart by
    assert equal(Summary("a", {0: 50.0}, {}), Summary("b", {1: 90.0}, {}), 1.0)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/studies/*.yaml")), ids=lambda path: path.stem)
def test_published_studies_are_of_a_million_parameters_and_say_paper_and_command(path):
    study, text = read_study(path), path.read_text()
    assert "https://arxiv.org/abs/" in text and f"python -m tools.study {path.relative_to(ROOT)}" in text
    assert study.seeds >= 3
    for cell in study.cells:
        args = parse_args(Classification.flags, study.command(cell, 0, Path("unused"), "cpu")[2:])
        with torch.device("meta"):
            model = timm.create_model(args.arch, num_classes=10, img_size=args.input_size, **args.model_kwargs)
        assert 0.8e6 < sum(weight.numel() for weight in model.parameters()) < 1.3e6


def test_a_killed_study_takes_its_runs_with_it(tmp_path):
    code = "import os, time; from tools.study.cell import end_with_study; end_with_study(); time.sleep(60)"
    read_end, write_end = os.pipe()
    run = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"STUDY_PIPE": str(read_end)}, pass_fds=(read_end,)
    )
    os.close(read_end)
    os.close(write_end)
    assert run.wait(timeout=30) == 1
