import json
import os

import numpy as np
import pytest
from PIL import Image

from tools.benchmark import __main__ as benchmark
from tools.benchmark.contenders import Contender
from tools.benchmark.elsewhere import RunnerElsewhere, peak_memory
from tools.benchmark.settings import Settings
from tools.benchmark.stopwatch import speed_ratio
from utils import UserError

TINY = ["--img-size", "32", "--batch-size", "2", "--threads", "1"]


def report(path, *words):
    benchmark.main([*words, *TINY, "--json", str(path)])
    return json.loads(path.read_text())


def test_models_are_measured_side_by_side(tmp_path, capsys):
    labels = ["spectformer_ti", "plain:spectformer_ti@bfloat16"]
    parts = ["--parts", "training", "inference", "latency", "spectral-share"]
    written = report(tmp_path / "out.json", *labels, "--rounds", "3", *parts)
    run = written["runs"][0]
    assert list(run["models"]) == labels and "--rounds 3" in run["command"]
    assert written["machine"]["threads"] == 1 and written["machine"]["torch"]
    for label, row in run["models"].items():
        assert row["training_images_per_s"] > 0 and row["inference_images_per_s"] > 0 and row["latency_ms"] > 0
        assert row["training_quartiles_ms"][0] <= row["training_ms"] <= row["training_quartiles_ms"][1]
        assert row["parameters"] == 8_888_040 and 0 < row["utilisation"] < 2
        assert row["settings"]["dtype"] == ("bfloat16" if label.startswith("plain") else "float32")
    assert 0 < run["models"]["spectformer_ti"]["spectral_share"] < 1
    for table in run["ratios"].values():
        assert table[labels[0]][labels[0]] == 1
        assert table[labels[0]][labels[1]] == pytest.approx(1 / table[labels[1]][labels[0]], rel=1e-6)
    table = capsys.readouterr().out
    assert all(label in table for label in labels) and max(map(len, table.splitlines())) <= 100


def test_a_compiled_models_graph_breaks_are_counted(tmp_path):
    labels = ["spectformer_h_n@compile", "plain:spectformer_ti"]
    run = report(tmp_path / "out.json", *labels, "--rounds", "1", "--parts", "graph-breaks")["runs"][0]
    assert [run["models"][label]["graph_breaks"] for label in labels] == [0, 0]


def test_peak_memory_counts_weights_gradients_and_optimiser_state():
    contender = Contender.parse("spectformer_ti", Settings(batch_size=1, img_size=32))
    with RunnerElsewhere(contender) as runner:
        assert runner.call(peak_memory, "training") > 4 * 8.888 * 4 / 1.05  # four copies of the parameters


def test_a_process_that_dies_is_named_by_its_contender():
    contender = Contender.parse("spectformer_ti", Settings(batch_size=1, img_size=32))
    with RunnerElsewhere(contender) as runner, pytest.raises(UserError, match="spectformer_ti: the process .* died"):
        runner.call(die)


def die(_):
    os._exit(9)


def test_layers_are_measured_against_plain_ones(tmp_path, capsys):
    words = ["--layers", "--grids", "7", "8", "--channels", "32", "--rounds", "1"]
    rows = report(tmp_path / "out.json", *words)["runs"][0]["layers"]
    names = {"spectral", "scattering_channel", "scattering_channel_token", "wavelet", "attention"}
    assert {(row["layer"], row["grid"]) for row in rows} == {(name, grid) for name in names for grid in (7, 8)}
    assert all(row["training_ratio"] > 0 and row["inference_ours_ms"] > 0 for row in rows)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


@pytest.fixture
def images(tmp_path):
    for name in "ab":
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((40, 50, 3), 20 * i, np.uint8)).save(tmp_path / "val" / name / f"{i}.jpg")
    return str(tmp_path)


def test_errors_of_half_precision_are_measured(tmp_path, images, capsys):
    words = ["--exactness", images, "svt_h_n", "spectformer_ti", "--dtype", "bfloat16", "--steps", "2"]
    rows = report(tmp_path / "out.json", *words, "--batch-size", "2", "--img-size", "32")["runs"][0]["exactness"]
    assert [row["trained"] for row in rows.values()] == [True, False]
    for row in rows.values():
        assert len(row["logit_error"]) == (1 if row["trained"] else 3)
        assert all(1e-4 < error < 0.05 for error in row["logit_error"])
        assert [len(losses) for losses in row["losses"]] == [2, 2, 2]
        assert len(row["loss_gap"]) == 3 and all(0 < gap < 0.2 for gap in row["loss_gap"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_nothing_is_compared_with_itself(images):
    with pytest.raises(UserError, match="--dtype bfloat16 or float16"):
        benchmark.main(["--exactness", images, "spectformer_ti"])


def test_loader_is_measured_against_timms(tmp_path, images):
    words = ["--loader", images, "--workers", "0", "--rounds", "2"]
    figures = report(tmp_path / "out.json", *words)["runs"][0]["loader"]
    assert figures["images"] == 8 and figures["images_per_s"]["timm"] > 0 and figures["ratio"] > 0


@pytest.mark.parametrize("label", ["plain:resnet50", "no_such_model", "svt_h_s@int8"])
def test_unknown_contender_is_named(label):
    with pytest.raises(UserError, match=label):
        benchmark.main([label])


def test_models_are_measured_without_stochastic_depth():
    model = Contender.parse("svt_h_s", Settings(batch_size=1, img_size=32)).build().train()
    assert model.stages[2].blocks[0].drop_path.drop_prob == 0


def test_ratio_is_the_median_of_the_rounds_ratios():
    seconds = {"a": [1.0, 10.0, 1.0], "b": [2.0, 30.0, 2.0]}
    assert speed_ratio(seconds, "a", "b") == 2


def test_suite_is_run_in_processes_of_its_own_into_one_report(tmp_path, monkeypatch, capfd):
    runs = tuple(f"spectformer_ti --rounds 1 --parts {part} {' '.join(TINY)}" for part in ("inference", "training"))
    monkeypatch.setitem(benchmark.SUITES, "cpu", runs)
    benchmark.main(["--suite", "cpu", "--json", str(tmp_path / "out.json")])
    written = json.loads((tmp_path / "out.json").read_text())
    assert [run["command"] for run in written["runs"]] == [f"python -m tools.benchmark {words}" for words in runs]
    assert [sorted(run["ratios"]) for run in written["runs"]] == [["inference"], ["training"]]
    assert written["machine"]["threads"] and all(words in capfd.readouterr().out for words in runs[:1])


def test_suite_ends_with_a_run_that_fails(monkeypatch, capfd):
    monkeypatch.setitem(benchmark.SUITES, "cpu", ("no_such_model", "spectformer_ti"))
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--suite", "cpu"])
    assert "no_such_model" in capfd.readouterr().err
