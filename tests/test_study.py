"""Studies: equal terms for every cell, resuming after a kill, whole architectures as cells, results and table."""

import json
import math
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tiny_runs import assert_same, last

from runtime.processes import Distributed
from tools import study as tool
from tools.study import Cell, Study, least_difference
from training.classification import Classification
from training.options import parse_args
from training.precision import choose_precision
from training.trainer import Run
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
    "cells": {"alpha 1": {"alpha": 1}, "peer": {"arch": "test_vit"}},
}
MEASURED = ("seconds", "inference_images_per_s")


def written(folder, **changes):
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY | changes, sort_keys=False))
    return folder / "tiny.yaml"


def words(folder, study, workers):
    return [str(study), "--output", str(folder), "--runs", str(folder / "runs"), "--workers", str(workers)]


def results(folder):
    path = folder / "tiny.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    kept = [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]
    return sorted(kept, key=lambda line: (line["cell"], line["seed"]))


def weights(folder):
    return {path.name: last(path)["model"] for path in sorted((folder / "runs" / "tiny").iterdir()) if path.is_dir()}


@pytest.mark.slow
def test_a_study_killed_in_the_middle_of_a_run_ends_with_the_same_bits(tmp_path):
    study = written(tmp_path, seeds=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    tool.main(words(whole, study, workers=2))
    page = (whole / "tiny.md").read_text()
    assert "| peer | " in page and "1 of 1 seeds" in page and "![Tiny](tiny.png)" in page and "nan" not in page
    assert (whole / "tiny.png").read_bytes().startswith(b"\x89PNG")

    killed.mkdir()
    process = subprocess.Popen([sys.executable, "-m", "tools.study", *words(killed, study, workers=1)], cwd=ROOT)
    deadline = time.monotonic() + 600
    while not (len(results(killed)) > 0 and len(list(killed.glob("runs/tiny/*/checkpoint_last.pth"))) > 1):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(results(killed)) == 1
    time.sleep(1)  # for the run that was going on to notice
    tool.main(words(killed, study, workers=2))
    assert results(killed) == results(whole) and len(results(whole)) == 2
    assert_same(weights(killed), weights(whole))


def initial_weights(study, cell, seed, folder):
    args = parse_args(Classification.flags, [*study.words[cell], "--seed", str(seed), "--output-dir", str(folder)])
    run = Run(args, Distributed(), choose_precision(args, torch.device("cpu")), directory=None, checkpoint=None)
    return Cell(run).model.state_dict()


def test_cells_of_a_seed_start_from_the_same_weights_except_for_their_mixers(tmp_path):
    cells = TINY["cells"] | {"convolution, pooling": {"mixers": "conv,pool"}}
    study = Study(written(tmp_path, cells=cells), [], None, tmp_path)
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
        ({"cels": {}}, [], "'cels' is missing, unknown or of a wrong type; expected title"),
        ({"cells": {"a": None}}, [], "cells: a: a cell must be a mapping"),
        ({"cells": {"a": {"alpha": 9}}}, [], "cells: a: .*alpha.* do not fit depths"),
        ({"recipe": {"arch": "spectformer_ti", "epoch": 3}}, [], "unknown key 'epoch'; did you mean epochs"),
        ({}, ["--epochs", "many"], "--epochs.*many"),
    ],
)
def test_a_mistake_in_a_study_is_one_line_that_names_it(tmp_path, changes, flags, expected):
    with pytest.raises(UserError, match=expected) as caught:
        Study(written(tmp_path, **changes), flags, None, tmp_path)
    assert "\n" not in str(caught.value)


def with_lines(tmp_path, accuracies):
    """A results file with invented accuracies, by cell and seed, and the words that report it."""
    study = Study(written(tmp_path), [], None, tmp_path)
    numbers = dict.fromkeys(("loss", "parameters", "gflops", "seconds"), 1) | {"images": 64, "test_images": 8}
    measured = {"machine": "an abacus", "torch": torch.__version__} | numbers
    with (tmp_path / "tiny.jsonl").open("w") as file:
        for (cell, seed), score in accuracies.items():
            line = {"cell": cell, "seed": seed, "acc1": score, "recipe": study.recipes[cell]} | measured
            file.write(json.dumps(line) + "\n")
    return [*words(tmp_path, tmp_path / "tiny.yaml", workers=1), "--report"]


def test_a_report_has_the_seeds_that_all_cells_have_trained_by_the_present_recipe(tmp_path):
    scores = {(cell, 0): 70.0 + place for place, cell in enumerate(TINY["cells"])} | {("peer", 1): 10.0}
    tool.main(with_lines(tmp_path, scores))
    page = (tmp_path / "tiny.md").read_text()
    assert "1 of 2 seeds" in page and "| peer | 71.00 ± 0.00 | 1 | 1.0000 | 64 | nan |" in page
    with pytest.raises(UserError, match="no seed of .* in every cell"):
        tool.main([*with_lines(tmp_path, scores), "--epochs", "2"])
    scores.pop(("alpha 1", 0))
    with pytest.raises(UserError, match="no seed of .* in every cell"):
        tool.main(with_lines(tmp_path, scores))


@pytest.mark.slow
def test_a_run_that_fails_ends_the_study_with_its_last_words(tmp_path):
    command = words(tmp_path, written(tmp_path), workers=1)
    with pytest.raises(UserError, match="alpha 1, seed 0: .*nowhere.*exit status 2"):
        tool.main([*command, "--data-set", "FOLDER", "--data-path", str(tmp_path / "nowhere")])


def test_a_difference_counts_if_it_holds_seed_by_seed():
    scores = torch.tensor([[50.0, 60.0, 40.0], [53.0, 62.0, 44.5]], dtype=torch.float64)
    expected = 2 * statistics.stdev([3.0, 2.0, 4.5]) / math.sqrt(3)  # for two cells: of their paired differences
    assert least_difference(scores) == pytest.approx(expected)
    moved = scores + torch.tensor([0.0, 7.0, 14.0])  # a seed that moves every cell tells nothing
    assert least_difference(moved) == pytest.approx(expected)
    assert math.isnan(least_difference(scores[:, :1]))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/studies/*.yaml")), ids=lambda path: path.stem)
def test_published_studies_name_paper_and_command_and_have_results_of_their_recipe(path, tmp_path):
    study, text = Study(path, [], None, tmp_path), path.read_text()
    assert "https://arxiv.org/abs/" in text and f"python -m tools.study {path.relative_to(ROOT)}" in text
    assert study.seeds >= 3
    results = ROOT / "docs" / "studies" / f"{path.stem}.jsonl"
    assert not results.exists() or len(tool.read_lines(study, results)) == len(results.read_text().splitlines())
