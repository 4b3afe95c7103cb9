"""A run's directory: one holder, a row an epoch, readable curves, the best checkpoints."""

import json
import math
import pathlib
import sys
import time

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models.checkpoints import peek, read_checkpoint
from runtime import checkpoints
from runtime.provenance import describe_run
from runtime.run_directory import RunDirectory
from utils import MachineError, UserError

PLOTS = {
    "loss_plot.png": {"Loss (nats)": {"train_loss": "training", "test_loss": "test"}},
    "acc_plot.png": {"Top-1 (%)": {"test_acc1": "top-1"}, "Top-5 (%)": {"test_acc5": "top-5"}},
}


def opened(path):
    return RunDirectory(path, "acc1", PLOTS)


def row(epoch, **more):
    return {
        "train_lr": 1e-3,
        "train_loss": 2.3 / (epoch + 1),
        "test_loss": 2.4 / (epoch + 1),
        "test_acc1": 50.0,
        "test_acc5": 90.0,
        "epoch": epoch,
        "n_parameters": 1000,
    } | more


def state(epoch):
    return {"model": {"w": torch.full((3,), float(epoch))}, "epoch": epoch, "step": 0}


def keep_best(run, state, score, k=1, key="acc1"):
    run.save_epoch(["checkpoint_last.pth"], state | {key: score}, k)


def logged(path):
    return [json.loads(line) for line in (path / "log.txt").read_text().splitlines()]


def names(path):
    return {entry.name for entry in path.iterdir()}


# ------------------------------------------------------------------------------------------------- the place
def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(MachineError, match=f"^{tmp_path}/run/.lock: cannot be written: "):
        opened(tmp_path / "run")
    for path in ("file/run", "file"):
        with pytest.raises(UserError, match=f"^{tmp_path}/{path}: cannot be a directory"):
            opened(tmp_path / path)


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    (tmp_path / ".checkpoint_last.pth.1-ab.tmp").write_bytes(b"half a file")
    with opened(tmp_path):
        assert names(tmp_path) == {".lock"}


# --------------------------------------------------------------------------------------------------- the log
@pytest.mark.slow
def test_a_row_of_an_epoch_appears_once_whatever_was_logged_before(tmp_path):
    with opened(tmp_path) as run:
        for epoch in range(4):
            run.log_row(row(epoch))
    with opened(tmp_path) as run:  # resumes from a checkpoint of epoch 2
        run.truncate_log(2)
        assert [r["epoch"] for r in logged(tmp_path)] == [0, 1]
        run.log_row(row(2, train_loss=8.0))
        run.log_row(row(3))
    assert [r["epoch"] for r in logged(tmp_path)] == [0, 1, 2, 3]
    assert [r["train_loss"] for r in logged(tmp_path)][2] == 8.0
    assert logged(tmp_path)[3] == row(3)


NOT_ROWS = [b"not a row", b'{"train_loss": 1}', b'{"name": "\xff"}', b"[1]", None]


@pytest.mark.parametrize("line", NOT_ROWS)
def test_a_file_that_is_not_a_log_is_named(tmp_path, line):
    log = tmp_path / "log.txt"
    if line is None:
        log.mkdir()
    else:
        log.write_bytes(json.dumps(row(0)).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=f"^{log}: not a run's log .* move"):
        opened(tmp_path)
    log.rename(tmp_path / "moved")
    with opened(tmp_path):  # the refusal has unlocked the directory
        pass


@pytest.mark.slow
def test_a_log_with_what_numbers_can_be_is_read_and_drawn(tmp_path):
    """As a run writes it: an evaluation in fp16 may overflow."""
    with opened(tmp_path) as run:
        run.log_row(row(0, test_loss=math.inf, test_acc1=math.nan, note=None))
    with opened(tmp_path) as run:
        run.truncate_log(1)
        run.log_row(row(1))
    assert [r["test_loss"] for r in logged(tmp_path)] == [math.inf, 1.2]


@pytest.mark.slow
def test_tensorboard_goes_on_where_the_log_does(tmp_path):
    for start in (0, 2):  # the first run is killed after epoch 3, the second resumes from epoch 2
        with opened(tmp_path) as run:
            run.truncate_log(start)
            for epoch in range(start, 4):
                run.log_row(row(epoch, train_loss=10.0 * start + epoch))
        time.sleep(1.1)  # the events files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 0), (1, 1), (2, 22), (3, 23)]
    assert "test/acc1" in events.Tags()["scalars"]


# ----------------------------------------------------------------------------------------------- checkpoints
def best_files(path):
    return {found.name: peek(found)["acc1"] for found in path.glob("checkpoint_best*")}


def test_the_best_checkpoint_stays_the_best(tmp_path):
    with opened(tmp_path) as run:
        for epoch, acc1 in enumerate([50.0, 60.0, 60.0, 55.0], 1):
            keep_best(run, state(epoch), acc1)
    assert best_files(tmp_path) == {"checkpoint_best.pth": 60.0}
    assert read_checkpoint(tmp_path / "checkpoint_best.pth")["epoch"] == 2
    with opened(tmp_path) as run:  # resumes from epoch 3, and finds out what the best was
        keep_best(run, state(4), 59.0)
        assert best_files(tmp_path) == {"checkpoint_best.pth": 60.0}
        keep_best(run, state(5), 61.0)
    assert read_checkpoint(tmp_path / "checkpoint_best.pth")["epoch"] == 5


def test_the_k_best_are_kept(tmp_path):
    with opened(tmp_path) as run:
        for epoch, acc1 in enumerate([50.0, 70.0, 60.0, 55.0, 60.0, 80.0], 1):
            keep_best(run, state(epoch), acc1, 3)
    assert best_files(tmp_path) == {
        "checkpoint_best.pth": 80.0,
        "checkpoint_best_0001.pth": 70.0,
        "checkpoint_best_0002.pth": 60.0,
        "checkpoint_best_0005.pth": 80.0,
    }


def test_no_best_is_lost_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    with opened(tmp_path) as run:
        for epoch, acc1 in enumerate([50.0, 60.0], 1):
            keep_best(run, state(epoch), acc1, 2)
        before = best_files(tmp_path)
        with monkeypatch.context() as patch, pytest.raises(MachineError):
            patch.setattr(checkpoints, "save", lambda *_: (_ for _ in ()).throw(MachineError("full")))
            keep_best(run, state(3), 70.0, 2)
        assert best_files(tmp_path) == before
        keep_best(run, state(3), 70.0, 2)
    assert best_files(tmp_path) == {
        "checkpoint_best.pth": 70.0,
        "checkpoint_best_0001.pth": 60.0,
        "checkpoint_best_0002.pth": 70.0,
    }


# ------------------------------------------------------------------------------------ arguments
@pytest.mark.slow
def test_args_yaml_tells_how_to_run_it_again(tmp_path):
    args = {"lr": 1e-3, "path": pathlib.Path("a b"), "aa": None, "betas": (0.9, 0.99), "kw": {"d": 4}}
    with opened(tmp_path) as run:
        run.write_args(describe_run(args, ["main.py", "--data-path", "a b"], processes=1))
    record = yaml.safe_load((tmp_path / "args.yaml").read_text())
    assert record["command"] == "python main.py --data-path 'a b'"
    assert record["args"] == {"lr": 1e-3, "path": "a b", "aa": None, "betas": [0.9, 0.99], "kw": {"d": 4}}
    assert set(record["versions"]) == {"python", "torch", "torchvision", "timm", "numpy"}
    assert all(record["versions"].values()) and record["processes"] == 1
    assert record["git"] is None or record["git"].keys() == {"commit", "dirty"}


class FakeWandb:
    """What of the package is used: the runs it was asked for, by id, and what was logged."""

    def __init__(self):
        self.asked, self.rows, self.ended = [], [], 0
        self.id = "abc"

    def init(self, **asked):
        self.asked.append(asked)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "epoch")

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.ended += 1


@pytest.mark.slow
def test_weights_and_biases_gets_the_rows_and_a_run_that_goes_on_is_the_same_one(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for epoch in (0, 1):
        with RunDirectory(tmp_path, "acc1", PLOTS, wandb="mine") as directory:
            directory.truncate_log(epoch)
            directory.write_args(describe_run({"lr": 1e-3}, ["main.py"], processes=1))
            directory.log_row(row(epoch))
    assert [(asked["project"], asked["id"]) for asked in fake.asked] == [("mine", None), ("mine", "abc")]
    assert fake.asked[0]["config"] == {"lr": 1e-3} and fake.ended == 2
    assert fake.rows == [row(epoch) for epoch in (0, 1)]


@pytest.mark.slow
def test_without_weights_and_biases_the_flag_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with RunDirectory(tmp_path, "acc1", PLOTS, wandb="mine") as directory, pytest.raises(UserError) as caught:
        directory.write_args(describe_run({"lr": 1e-3}, ["main.py"], processes=1))
    assert "--wandb mine needs pip install wandb" in str(caught.value)
