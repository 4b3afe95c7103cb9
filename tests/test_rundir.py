"""A run's directory: one holder, a row an epoch, readable curves, the best checkpoints, one writing rank."""

import argparse
import io
import json
import math
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rundir
from checkpointing import load, read_label
from rundir import ACCURACIES, LOSSES, RunDirectory, draw_curves
from utils import Distributed, MachineError, UserError

MAIN = Distributed()


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


def logged(path):
    return [json.loads(line) for line in (path / "log.txt").read_text().splitlines()]


def names(path):
    return {entry.name for entry in path.iterdir()}


# -------------------------------------------------------------------------------------------------- the lock
HOLDER = """
import sys, time, torch
from rundir import RunDirectory
from utils import Distributed

class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 1000
    def __getitem__(self, i):
        time.sleep(0.01)
        return i

run = RunDirectory(sys.argv[1], Distributed())
for _ in torch.utils.data.DataLoader(Numbers(), num_workers=2):
    print("held", flush=True)
"""


def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path):
    with RunDirectory(tmp_path / "run", MAIN):
        told = rf"^{tmp_path}/run: another run holds it \(process {os.getpid()} on .+ since .+\); wait"
        with pytest.raises(UserError, match=told):
            RunDirectory(tmp_path / "run", MAIN)
    RunDirectory(tmp_path / "run", MAIN).close()


def test_the_lock_of_a_killed_run_clears_though_its_workers_still_live(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(rundir.__file__).parent)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {holder.pid} on "):
        RunDirectory(tmp_path, MAIN)
    (tmp_path / ".checkpoint_last.pth.1-ab.tmp").write_bytes(b"half a file")
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunDirectory(tmp_path, MAIN):
        assert names(tmp_path) == {".lock"}
    holder.stdout.close()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(MachineError, match=f"^{tmp_path}/run/.lock: cannot be written: "):
        RunDirectory(tmp_path / "run", MAIN)
    for path in ("file/run", "file"):
        with pytest.raises(UserError, match=f"^{tmp_path}/{path}: cannot be a directory"):
            RunDirectory(tmp_path / path, MAIN)


def test_a_full_disk_keeps_log_and_curves(tmp_path):
    with RunDirectory(tmp_path, MAIN) as run:
        run.log_row(row(0))
        before = (tmp_path / "loss_plot.png").read_bytes()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        try:
            for offset in (0, 100, 20_000):
                resource.setrlimit(resource.RLIMIT_FSIZE, (offset, hard))
                with pytest.raises(MachineError, match="cannot be written: File too large"):
                    run.log_row(row(1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert (tmp_path / "loss_plot.png").read_bytes() == before
        assert len(logged(tmp_path)) in (1, 2)
        assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*.tmp"))


# --------------------------------------------------------------------------------------------------- the log
def test_a_row_of_an_epoch_appears_once_whatever_was_logged_before(tmp_path):
    with RunDirectory(tmp_path, MAIN) as run:
        for epoch in range(4):
            run.log_row(row(epoch))
    with RunDirectory(tmp_path, MAIN) as run:  # goes on from a checkpoint of epoch 2
        run.truncate_log(2)
        assert [r["epoch"] for r in logged(tmp_path)] == [0, 1]
        run.log_row(row(2, train_loss=7.0))
        run.log_row(row(2, train_loss=8.0))
        run.log_row(row(3))
    assert [r["epoch"] for r in logged(tmp_path)] == [0, 1, 2, 3]
    assert [r["train_loss"] for r in logged(tmp_path)][2] == 8.0
    assert logged(tmp_path)[3] == row(3)


def test_a_log_that_is_none_is_named(tmp_path):
    (tmp_path / "log.txt").write_text(json.dumps(row(0)) + "\nnot a row\n")
    with pytest.raises(UserError, match=f"^{tmp_path}/log.txt: line 2 is not a row"):
        RunDirectory(tmp_path, MAIN)
    assert "not a row" in (tmp_path / "log.txt").read_text()
    (tmp_path / "log.txt").unlink()
    RunDirectory(tmp_path, MAIN).close()  # the refusal has given the lock back


def test_tensorboard_goes_on_where_the_log_does(tmp_path):
    for start in (0, 2):  # the first run is killed after epoch 3, the second goes on from epoch 2
        with RunDirectory(tmp_path, MAIN) as run:
            run.truncate_log(start)
            for epoch in range(start, 4):
                run.log_row(row(epoch, train_loss=10.0 * start + epoch))
        time.sleep(1.1)  # the events files are named by the second
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 0), (1, 1), (2, 22), (3, 23)]
    assert "test/acc1" in events.Tags()["scalars"]


# ------------------------------------------------------------------------------------------------ the curves
def ema_row(epoch):
    return row(epoch, test_ema_loss=1.0, test_ema_acc1=60.0, test_ema_acc5=95.0)


@pytest.mark.parametrize("epochs", [1, 2, 320])
def test_curves_have_integer_epochs_labels_and_every_column(epochs):
    for columns, label, count in [(LOSSES, "Loss (nats)", 3), (ACCURACIES, "Accuracy (%)", 4)]:
        figure = draw_curves([ema_row(epoch) for epoch in range(epochs)], columns, label)
        axes = figure.axes[0]
        assert axes.get_xlabel() == "Epoch" and axes.get_ylabel() == label
        assert len(axes.lines) == len(axes.get_legend().texts) == count
        assert all(len(line.get_xdata()) == epochs for line in axes.lines)
        assert all(tick == int(tick) for tick in axes.get_xticks())
        assert epochs > 1 or axes.lines[0].get_marker() == "o"  # a single point must be visible
    assert len(draw_curves([row(0)], LOSSES, "Loss").axes[0].lines) == 2


def test_curves_of_a_run_are_images_and_keep_no_figure_open(tmp_path):
    import matplotlib.pyplot

    with RunDirectory(tmp_path, MAIN) as run:
        run.log_row(row(0, train_loss=math.nan))
        run.log_row(row(1))
    for name in ("loss_plot.png", "acc_plot.png"):
        with Image.open(io.BytesIO((tmp_path / name).read_bytes())) as image:
            assert image.size == (840, 540) and image.convert("L").getextrema() == (0, 255)
    assert matplotlib.pyplot.get_fignums() == []


# ----------------------------------------------------------------------------------------------- checkpoints
def best_files(path):
    return {found.name: read_label(found)["acc1"] for found in path.glob("checkpoint_best*")}


def test_the_best_checkpoint_stays_the_best(tmp_path):
    with RunDirectory(tmp_path, MAIN) as run:
        for epoch, acc1 in enumerate([50.0, 60.0, 60.0, 55.0], 1):
            run.keep_best(state(epoch), acc1)
    assert best_files(tmp_path) == {"checkpoint_best.pth": 60.0}
    assert load(tmp_path / "checkpoint_best.pth")["epoch"] == 2
    with RunDirectory(tmp_path, MAIN) as run:  # goes on from epoch 3, and finds out what the best was
        run.keep_best(state(4), 59.0)
        assert best_files(tmp_path) == {"checkpoint_best.pth": 60.0}
        run.keep_best(state(5), 61.0)
    assert load(tmp_path / "checkpoint_best.pth")["epoch"] == 5


def test_a_best_of_epochs_that_are_trained_again_does_not_count(tmp_path):
    with RunDirectory(tmp_path, MAIN) as run:
        run.keep_best(state(1), 50.0, 2)
        run.keep_best(state(5), 90.0, 2)
        run.keep_best(state(2), 40.0, 2)  # went on from epoch 1
        assert best_files(tmp_path) == {
            "checkpoint_best.pth": 40.0,
            "checkpoint_best_0000.pth": 50.0,
            "checkpoint_best_0001.pth": 40.0,
        }


def test_the_k_best_are_kept(tmp_path):
    with RunDirectory(tmp_path, MAIN) as run:
        for epoch, acc1 in enumerate([50.0, 70.0, 60.0, 55.0, 60.0, 80.0], 1):
            run.keep_best(state(epoch), acc1, 3)
    assert best_files(tmp_path) == {
        "checkpoint_best.pth": 80.0,
        "checkpoint_best_0001.pth": 70.0,
        "checkpoint_best_0002.pth": 60.0,
        "checkpoint_best_0005.pth": 80.0,
    }


def test_no_best_is_lost_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    with RunDirectory(tmp_path, MAIN) as run:
        for epoch, acc1 in enumerate([50.0, 60.0], 1):
            run.keep_best(state(epoch), acc1, 2)
        before = best_files(tmp_path)
        for allowed in range(2):
            writes = iter([None] * allowed)

            def save(*args, real=rundir.checkpointing.save, writes=writes):
                if next(writes, "full") == "full":
                    raise MachineError("full")
                real(*args)

            with monkeypatch.context() as patch, pytest.raises(MachineError):
                patch.setattr(rundir.checkpointing, "save", save)
                run.keep_best(state(3), 70.0, 2)
            assert before.items() - best_files(tmp_path).items() <= {("checkpoint_best.pth", 60.0)}
        run.keep_best(state(3), 70.0, 2)
    assert best_files(tmp_path) == {
        "checkpoint_best.pth": 70.0,
        "checkpoint_best_0001.pth": 60.0,
        "checkpoint_best_0002.pth": 70.0,
    }


# ------------------------------------------------------------------------------------ arguments, other ranks
def test_args_yaml_tells_how_to_run_it_again(tmp_path):
    args = argparse.Namespace(lr=1e-3, path=pathlib.Path("a b"), aa=None, betas=(0.9, 0.99), kw={"d": 4})
    with RunDirectory(tmp_path, MAIN) as run:
        run.write_args(args, ["main.py", "--data-path", "a b"])
    record = yaml.safe_load((tmp_path / "args.yaml").read_text())
    assert record["command"] == "python main.py --data-path 'a b'"
    assert record["args"] == {"lr": 1e-3, "path": "a b", "aa": None, "betas": [0.9, 0.99], "kw": {"d": 4}}
    assert set(record["versions"]) == {"python", "torch", "torchvision", "timm", "numpy"}
    assert all(record["versions"].values()) and record["processes"] == 1
    assert record["git"] is None or record["git"].keys() == {"commit", "dirty"}


def test_only_the_main_rank_writes(tmp_path):
    with RunDirectory(tmp_path / "run", Distributed(rank=1, world_size=2)) as run:
        run.write_args({}, [])
        run.truncate_log(0)
        run.log_row(row(0))
        run.save_checkpoint("checkpoint_last.pth", state(0))
        run.keep_best(state(1), 50.0, 2)
    assert names(tmp_path) == set()
    with RunDirectory(tmp_path / "run", MAIN) as run:
        run.save_checkpoint("checkpoint_last.pth", state(0))
    assert load(tmp_path / "run" / "checkpoint_last.pth")["epoch"] == 0
