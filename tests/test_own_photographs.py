"""The first hour with one's own photographs: a recipe without a rate, names of runs, and what a run says of itself."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tiny_runs import last, rows, timeless, train

import engine
import main_transfer
from models.checkpoints import CheckpointError
from training.classification_flags import FLAGS
from training.options import parse_args
from utils import Interrupted, UserError

EPOCH = ["--epochs", "1", "--mixup", "0", "--cutmix", "0"]


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(engine.RunDirectory, "_draw", lambda *_: None)


def transfer(*words):
    return parse_args(FLAGS, words, main_transfer.RECIPES)


def photographs(folder, splits=("train", "val")):
    for split in splits:
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for number in range(2):
                Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


def test_transfer_without_a_rate_follows_the_one_machine_recipe_and_with_one_the_published():
    chosen = transfer("--epochs", "3", "--batch-size", "8")
    assert chosen.config == main_transfer.RECIPES[1]
    assert (chosen.opt, chosen.lr_scale, chosen.epochs, chosen.batch_size) == ("nmuon", "sqrt", 3, 8)
    published = transfer("--lr", "0.0001", "--weight-decay", "1e-4", "--warmup-epochs", "5", "--epochs", "1000")
    assert published.config == main_transfer.RECIPES[0]
    kept = {"opt": "adamw", "lr_scale": "linear", "classifier": "new", "layer_decay": None, "sched_on_updates": False}
    assert {name: getattr(published, name) for name in kept} == kept
    assert transfer("--config", main_transfer.RECIPES[0]).lr == 1e-4


@pytest.mark.slow
def test_the_one_machine_recipe_learns_digits_in_twenty_updates(tmp_path):
    flags = ["--finetune", "spectformer_h_n", "--train-part", "0.1", "--num-workers", "0"]
    main_transfer.main([*flags, "--batch-size", "64", "--output-dir", str(tmp_path)])
    assert rows(tmp_path)[-1]["test_acc1"] > 85


def test_runs_are_named_after_their_folder(tmp_path):
    for name in ("holidays", "birds"):
        args = transfer("--data-path", str(photographs(tmp_path / name)), "--arch", "svt-h-n")
        assert args.output_dir == f"runs/svt-h-n-{name}"
    assert transfer("--data-path", "d", "--data-set", "CARS", "--arch", "svt_h_n").output_dir == "runs/svt_h_n-cars"


@pytest.mark.slow
def test_a_dry_run_is_not_refused_for_a_directory_that_exists_and_writes_nothing(tmp_path):
    train(tmp_path, *EPOCH)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="continues that run"):
        train(tmp_path, *EPOCH)
    train(tmp_path, *EPOCH, "--dry-run")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_resumed_run_keeps_its_first_command_and_adds_the_later_one(tmp_path, monkeypatch, capsys):
    def record():
        return yaml.safe_load((tmp_path / "args.yaml").read_text())

    monkeypatch.setattr("sys.argv", ["main_spectformer.py", "first"])
    train(tmp_path, *EPOCH)
    first = record()
    monkeypatch.setattr("sys.argv", ["main_spectformer.py", "later"])
    train(tmp_path, *EPOCH, "--resume", "auto")
    assert "nothing left to train: 1 epochs are done" in capsys.readouterr().out
    train(tmp_path, *EPOCH[2:], "--epochs", "2", "--resume", "auto")
    assert f"resuming from {tmp_path / 'checkpoint_last.pth'}, epoch 1, step 0" in capsys.readouterr().out
    resumed = record()
    commands = [entry["command"] for entry in resumed["resumed"]]
    assert commands == ["python main_spectformer.py later"] * 2 and resumed["resumed"][1]["changed"]["epochs"] == 2
    assert {name: resumed[name] for name in first} == first
    train(tmp_path, "--resume", str(tmp_path), model=[])  # reads the settings of the last command
    assert len(rows(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("source", ["spectformer_h_n", "a run"])
def test_weights_to_begin_with_can_be_a_model_or_a_run_and_bring_their_image_size(tmp_path, source):
    if source == "a run":
        source = str(tmp_path)
        train(tmp_path, *EPOCH)
        (tmp_path / "checkpoint_last.pth").unlink()
    args = transfer("--finetune", source)
    assert Path(args.finetune).is_file() and tuple(args.input_size) == (32, 32)
    assert transfer("--finetune", source, "--input-size", "64").input_size == (64, 64)
    with pytest.raises(CheckpointError, match="no such file or run directory"):
        transfer("--finetune", "spectformer_b")


@pytest.mark.slow
def test_the_first_lines_say_what_is_trained_and_how(tmp_path, capsys):
    train(tmp_path, *EPOCH, "--freeze-at", "1", "--warmup-updates", "9", "--sched-on-updates", "--lr", "9e-3")
    out = capsys.readouterr().out
    frozen = sum(value.numel() for name, value in last(tmp_path)["model"].items() if name.startswith("patch_embed"))
    total = rows(tmp_path)[0]["n_parameters"]
    assert 0 < frozen < total and f"{total:,} parameters (" in out and " trained)" in out
    assert "warning: the number of updates is only 4" in out
    assert "the warm-up does not end within --epochs 1" in out


def test_an_interrupted_run_names_the_command_that_resumes_it(tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise Interrupted(2)

    monkeypatch.setattr(engine, "evaluate", interrupt)
    monkeypatch.setattr("sys.argv", ["main_spectformer.py"])
    with pytest.raises(Interrupted):
        train(tmp_path, *EPOCH)
    assert f"to resume: python main_spectformer.py --resume {tmp_path}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_plateau_schedule_resumes_where_it_was(tmp_path):
    flags = [*EPOCH[2:], "--sched", "plateau", "--patience-epochs", "0", "--lr", "0", "--min-lr", "0"]
    train(tmp_path / "whole", *flags, "--epochs", "3")
    train(tmp_path / "parts", *flags, "--epochs", "2")
    train(tmp_path / "parts", *flags, "--epochs", "3", "--resume", "auto")
    assert timeless(rows(tmp_path / "whole")) == timeless(rows(tmp_path / "parts"))
    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    assert whole["plateau"] == parts["plateau"] and whole["plateau"]["last_epoch"] == 2
    assert all(torch.equal(value, parts["model"][name]) for name, value in whole["model"].items())


@pytest.mark.slow
def test_mistakes_of_the_first_hour_are_answered_with_the_way_out(tmp_path):
    (tmp_path / "svt_s.yaml").write_text("epochs: 2\n")
    with pytest.raises(UserError, match=r"did you mean .*svt_s\.yaml\?"):
        transfer("--config", str(tmp_path / "svt_s.py"))
    train(tmp_path / "run", *EPOCH)
    with pytest.raises(UserError, match=f"--finetune {tmp_path / 'run'}"):
        train(tmp_path / "run", *EPOCH, "--resume", "auto", "--batch-size", "32")
    with pytest.raises(UserError, match="--val-split"):
        train(tmp_path / "flat", *EPOCH, "--data-path", str(photographs(tmp_path / "cats", ["."])))
