"""python -m tools.benchmark: what is measured, how ratios are made, mistakes."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from models import ModelError
from tools import benchmark
from tools.contenders import speed_ratio, take_turns
from utils import UserError

TINY = ["--img-size", "32", "--batch-size", "2"]


def report(path, *words):
    benchmark.main([*words, *TINY, "--json", str(path)])
    return json.loads(path.read_text())


@pytest.mark.slow
def test_models_are_measured_side_by_side(tmp_path, capsys):
    labels = ["spectformer_ti", "plain:spectformer_ti@bfloat16"]
    written = report(tmp_path / "out.json", *labels, "--rounds", "3")
    run = written["runs"][0]
    assert list(run["models"]) == labels and "--rounds 3" in run["command"]
    assert written["machine"]["threads"] > 0 and written["machine"]["torch"]
    for label, row in run["models"].items():
        assert row["training_images_per_s"] > 0 and row["inference_images_per_s"] > 0
        assert len(row["training_seconds"]) == 3 and row["parameters"] == 8_888_040
        assert row["settings"]["dtype"] == ("bfloat16" if label.startswith("plain") else "float32")
    for table in run["ratios"].values():
        assert table[labels[0]][labels[0]] == 1
        assert table[labels[0]][labels[1]] == pytest.approx(1 / table[labels[1]][labels[0]])
    memory = run["models"]["spectformer_ti"]["training_peak_mib"]
    assert memory > 4 * 8.888 * 4 / 1.05  # parameters, gradients and two moments
    table = capsys.readouterr().out
    assert all(label in table for label in labels) and max(map(len, table.splitlines())) <= 120


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectformer_h_n", "svt_h_n"])
def test_a_compiled_model_has_no_graph_breaks(name):
    model = timm.create_model(name).eval()
    assert torch._dynamo.explain(model.forward)(torch.randn(2, 3, 32, 32)).graph_break_count == 0


@pytest.mark.slow
def test_layers_are_measured_with_and_without_kernels(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "GRIDS", (7, 8))
    rows = report(tmp_path / "out.json", "--layers", "--rounds", "1")["runs"][0]["layers"]
    expected = [(name, grid, part) for grid in (7, 8) for name in benchmark.MIXERS for part in benchmark.PARTS]
    assert [(row["mixer"], row["grid"], row["part"]) for row in rows] == expected
    assert all(row["ratio"] > 0 and row["ms"] > 0 for row in rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120


@pytest.fixture
def images(tmp_path):
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((40, 50, 3), 20 * i, np.uint8)).save(tmp_path / "val" / name / f"{i}.jpg")
    return str(tmp_path)


@pytest.mark.slow
def test_errors_of_half_precision_and_the_loader_are_measured(tmp_path, images, monkeypatch):
    monkeypatch.setattr(benchmark, "STEPS", 2)
    words = ["--exactness", images, "svt_h_n", "--dtype", "bfloat16"]
    rows = report(tmp_path / "out.json", *words)["runs"][0]["exactness"]
    for row in rows.values():
        assert len(row["logit_error"]) == len(row["loss_gap"]) == 3
        assert all(1e-4 < error < 0.05 for error in row["logit_error"])
        assert all(0 < gap < 0.2 for gap in row["loss_gap"])
    words = ["--loader", images, "--workers", "0", "--rounds", "2"]
    figures = report(tmp_path / "out.json", *words)["runs"][0]["loader"]
    assert figures["images"] == 8 and figures["images_per_s"]["timm"] > 0 and figures["ratio"] > 0


@pytest.mark.parametrize("label", ["plane:resnet50", "no_such_model", "svt_h_s@int8"])
def test_an_unknown_contender_is_named(label):
    with pytest.raises((UserError, ModelError), match=label):
        benchmark.main([label])


def test_runs_take_turns_there_and_back_and_a_ratio_is_of_medians():
    order = []
    runs = {name: lambda name=name: order.append(name) or len(order) for name in "ab"}
    seconds = take_turns(runs, 2)
    assert order == ["a", "b", "a", "b", "b", "a"] and seconds == {"a": [3, 6], "b": [4, 5]}
    assert speed_ratio({"a": [1.0, 10.0, 1.0], "b": [2.0, 30.0, 2.0]}, "a", "b") == 2


@pytest.mark.slow
def test_a_suite_keeps_the_figures_of_its_runs_before_one_that_fails(tmp_path, monkeypatch):
    runs = (f"spectformer_ti --rounds 1 --parts inference {' '.join(TINY)}", "no_such_model")
    monkeypatch.setattr(benchmark, "SUITE", runs)
    with pytest.raises(ModelError, match="no_such_model"):
        benchmark.main(["--suite", "cpu", "--json", str(tmp_path / "out.json")])
    (run,) = json.loads((tmp_path / "out.json").read_text())["runs"]
    assert run["command"] == f"python -m tools.benchmark {runs[0]}" and list(run["ratios"]) == ["inference"]
