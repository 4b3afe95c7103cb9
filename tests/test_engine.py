"""The engine with a task that knows no classes, and what it promises for any task."""

import argparse
import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import assert_same, train
from torch import nn

import engine
from detection.task import Detection
from inputs.loader import Batch
from models.checkpoints import read_checkpoint
from runtime import checkpoints
from runtime.processes import Distributed
from training.classification import evaluate
from training.evaluation import evaluation_batches
from training.log import progress_bar, show_progress
from training.options import TaskFlags, parse_args
from training.precision import Precision, choose_precision, set_up_device
from training.task import Task
from training.trainer import Progress
from utils import Interrupted


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    monkeypatch.setattr(engine.RunDirectory, "_draw", lambda *_: None)


class Points:
    """Batches (x, y, indices) of a line with noise, the same for every pass over an epoch."""

    skipped: dict[str, str] = {}

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def __len__(self):
        return 4

    def epoch(self, epoch, start_step=0):
        for step in range(start_step, len(self)):
            generator = torch.Generator().manual_seed(100 * epoch + step)
            x = torch.randn(self.args.batch_size, 3, generator=generator)
            yield x, x @ torch.tensor([[1.0], [-2.0], [0.5]]), torch.arange(len(x))


class Validation:
    """The batches of an epoch that is never trained."""

    dataset = range(64)

    def __init__(self, points: Points):
        self.rounds = len(points)
        self._points = points
        self.read = 0

    def __iter__(self):
        for batch in self._points.epoch(10**6):
            self.read += 1
            yield batch


class Regression(Task):
    """Least squares with noise on the inputs, which is drawn where the engine says."""

    flags = TaskFlags({}, lambda given: {}, lambda args: {"data_set": "points"}, [])
    ranked_by = "fit"
    score_format = "fit {:.3f}"
    shown = ("fit",)
    sample_flags = ()
    plots = {"fit.png": {"Error": {"train_loss": "training", "test_error": "test"}}}

    def __init__(self, run):
        self.args, self.dist = run.args, run.dist
        torch.manual_seed(run.args.seed)
        self.model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.train = Points(run.args)
        self.val = Validation(self.train)

    def prepare(self, batch):
        x, y, _ = batch
        return x + 0.1 * torch.randn_like(x), y

    def loss(self, model, prepared):
        return nn.functional.mse_loss(model(prepared[0]), prepared[1])

    def finite_samples(self, model, batch):
        return [(int(i), bool(row.isfinite().all())) for i, row in zip(batch[2], model(batch[0]), strict=True)]

    def evaluate(self, model, stop):
        if stop is not None and stop.signum:
            raise Interrupted(stop.signum)
        model.eval()
        with torch.no_grad():
            errors = [nn.functional.mse_loss(model(x), y).item() for x, y, _ in evaluation_batches(self.val, self.dist)]
        error = sum(errors) / len(errors)
        return {"fit": -error, "error": error}

    def sample_name(self, index):
        return f"point {index}"

    def identity(self):
        return {"width": 8}

    def record(self):
        return {"about": "a line"}

    def describe(self):
        return "points on a line"


FLAGS = ["--batch-size", "16", "--epochs", "3", "--warmup-epochs", "0", "--unscale-lr", "--lr", "5e-2", "--model-ema"]


def args_of(directory, *flags):
    words = ["--output-dir", str(directory), "--num-workers", "0", "--device", "cpu", *FLAGS, *flags]
    return parse_args(Regression.flags, words)


def finished(directory):
    state = torch.load(directory / "checkpoint_last.pth", weights_only=True)
    clocks = ("seconds", "images_per_second", "wait_seconds", "memory_gib")
    log = [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in clocks} for row in log]
    return {name: value for name, value in state.items() if name not in ("args", "version", "lineage")}, rows


@pytest.mark.slow
def test_a_task_without_classes_trains_and_is_ranked_by_its_own_score(tmp_path, capsys):
    engine.fit(Regression, args_of(tmp_path))
    state, rows = finished(tmp_path)
    assert rows[-1]["test_error"] < rows[0]["test_error"] / 2
    best = max(row[name] for row in rows for name in ("test_fit", "test_fit_ema"))
    assert state["best_fit"] == best and state["about"] == "a line" and not any("acc" in name for name in state)
    output = capsys.readouterr().out
    assert "points on a line" in output and f"best fit {best:.3f}" in output


def test_a_dry_run_tries_one_update_and_one_batch_of_evaluation_and_writes_nothing(tmp_path, monkeypatch, capsys):
    steps, tasks = [], []
    original = engine.step_loss
    monkeypatch.setattr(engine, "step_loss", lambda *args: steps.append(args[3]) or original(*args))
    built = Regression.__init__
    monkeypatch.setattr(Regression, "__init__", lambda self, run: (built(self, run), tasks.append(self))[0])
    engine.fit(Regression, args_of(tmp_path / "run", "--dry-run", "--accum-iter", "2"))
    assert steps == [0, 1] * 2 and tasks[0].val.read == 2 * 2  # twice, the weights and their average
    assert not list(tmp_path.iterdir())
    output = capsys.readouterr().out
    assert "images/s in training" in output and "GiB of memory; nothing was written" in output


@pytest.mark.slow
def test_a_dry_run_goes_on_from_a_checkpoint_and_leaves_it(tmp_path, monkeypatch, capsys):
    engine.fit(Regression, args_of(tmp_path))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    original, epochs = engine.step_loss, []
    monkeypatch.setattr(engine, "step_loss", lambda *args: epochs.append(args[2]) or original(*args))
    engine.fit(Regression, args_of(tmp_path, "--dry-run", "--resume", "auto", "--epochs", "9"))
    assert set(epochs) == {finished(tmp_path)[0]["epoch"]} != {0}
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "dry run: " in capsys.readouterr().out


@pytest.mark.slow
def test_a_task_without_classes_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    engine.fit(Regression, args_of(tmp_path / "whole"))
    original, calls = engine.step_loss, []

    def watched(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(engine, "step_loss", watched)
        engine.fit(Regression, args_of(tmp_path / "stopped"))
    engine.fit(Regression, args_of(tmp_path / "stopped", "--resume", "auto"))
    whole, stopped = finished(tmp_path / "whole"), finished(tmp_path / "stopped")
    assert_same(whole[0], stopped[0])
    assert whole[1] == stopped[1]


@pytest.mark.slow
def test_the_gradient_is_clipped_at_the_norm_that_is_asked_for(tmp_path, monkeypatch):
    """Before the optimiser sees it; the log has the norm as it was."""
    steps = []
    torch_step = torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        gradients = [weight.grad.flatten() for group in self.param_groups for weight in group["params"]]
        steps.append(torch.cat(gradients).norm().item())
        return torch_step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    engine.fit(Regression, args_of(tmp_path, "--clip-grad", "0.01", "--epochs", "1"))
    assert len(steps) == 4 and max(steps) <= 0.01 * (1 + 1e-4)
    assert finished(tmp_path)[1][0]["grad_norm"] > 0.1


@pytest.mark.parametrize(("device", "fixed"), [("cpu", True), ("cuda", True), ("cuda", False)])
def test_a_gpu_may_use_tf32_and_searches_for_algorithms_where_sizes_are_fixed(monkeypatch, device, fixed):
    precisions = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", precisions.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    set_up_device(torch.device(device), fixed)
    assert (precisions == ["high"]) == (device == "cuda")
    assert torch.backends.cudnn.benchmark == (device == "cuda" and fixed)
    assert Regression.fixed_sizes and not Detection.fixed_sizes


@pytest.mark.parametrize(("native", "amp"), [(True, torch.bfloat16), (False, torch.float16)])
def test_automatic_precision_is_bf16_only_where_the_gpu_has_it_natively(tmp_path, monkeypatch, native, amp):
    def supported(including_emulation=True):
        return including_emulation or native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert choose_precision(args_of(tmp_path), torch.device("cuda")).amp is amp
    assert choose_precision(args_of(tmp_path), torch.device("cpu")).amp is None


def test_an_epochs_row_has_the_time_spent_waiting_for_data(tmp_path, monkeypatch, capsys):
    epoch = Points.epoch

    def slow(self, *args):
        for batch in epoch(self, *args):
            time.sleep(0.05)
            yield batch

    monkeypatch.setattr(Points, "epoch", slow)
    engine.fit(Regression, args_of(tmp_path, "--epochs", "1"))
    row = json.loads((tmp_path / "log.txt").read_text())
    assert 0.2 <= row["wait_seconds"] <= row["seconds"] and row["memory_gib"] > 0
    assert "images/s per process" in capsys.readouterr().out


def test_a_profile_of_some_updates_is_written(tmp_path, capsys):
    engine.fit(Regression, args_of(tmp_path, "--epochs", "1", "--accum-iter", "1", "--profile", "1"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("addmm" in event.get("name", "") for event in events)
    assert f"wrote {tmp_path}/trace.json" in capsys.readouterr().out


@pytest.mark.slow
def test_the_scale_of_fp16_losses_goes_on_where_it_was(tmp_path):
    path = tmp_path / "checkpoint_last.pth"
    engine.fit(Regression, args_of(tmp_path, "--amp", "fp16", "--epochs", "1"))
    state = read_checkpoint(path)
    state["scaler"]["scale"] = 2.0**10
    checkpoints.save(path, state)
    engine.fit(Regression, args_of(tmp_path, "--amp", "fp16", "--epochs", "2", "--resume", str(path)))
    assert read_checkpoint(path)["scaler"]["scale"] == 2.0**10


def test_every_process_evaluates_with_the_main_ones_batch_statistics(monkeypatch):
    """Those of the weights and of their average."""
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.fill_(7 + source))

    def evaluate(model, _stop):
        return {"mean": model.running_mean.item(), "variance": model.running_var.item()}

    trainer = SimpleNamespace(
        model=nn.BatchNorm1d(1),
        ema=SimpleNamespace(module=nn.BatchNorm1d(1)),
        dist=Distributed(world_size=2),
        task=SimpleNamespace(evaluate=evaluate),
        stop=None,
    )
    assert engine.evaluate(trainer) == {"mean": 7, "variance": 7, "mean_ema": 7, "variance_ema": 7}


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_elsewhere_a_line_now_and_then(monkeypatch, capsys, terminal):
    """Ten seconds a step of 3 x 8 images; of every second update, without a terminal."""
    progress = Progress(epoch=1)
    trainer = SimpleNamespace(
        args=SimpleNamespace(batch_size=8, accum_iter=2, print_freq=2),
        dist=Distributed(world_size=3),
        task=SimpleNamespace(train=range(12)),
        progress=progress,
        epochs=4,
        lr=0.1,
    )
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with progress_bar(trainer) as bar:
        for progress.step in (6, 8):
            progress.meters["seconds"] = 10.0 * progress.step
            show_progress(trainer, bar, 2.5)
    output = capsys.readouterr()
    line = "epoch 1 step 8/12: loss 2.5000, lr 1.00e-01, 2 images/s, 00:40 to go (the run: 04:40)\n"
    assert output.out == ("" if terminal else line)
    assert ("epoch 1: " in output.err) is terminal


@pytest.mark.slow
def test_the_first_signal_is_answered_at_once(tmp_path, monkeypatch, capfd):
    original = engine.step_loss

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        assert "finishing this step, then saving" in capfd.readouterr().err
        return original(*args)

    monkeypatch.setattr(engine, "step_loss", interrupted)
    with pytest.raises(Interrupted) as caught:
        engine.fit(Regression, args_of(tmp_path))
    assert caught.value.exit_code == 130


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "warned"), [("3", True), ("40", False)])
def test_a_schedule_that_stays_in_its_warm_up_is_warned_about(tmp_path, monkeypatch, capsys, epochs, warned):
    def stop(*_):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(engine, "train_one_epoch", stop)
    with pytest.raises(Interrupted):
        engine.fit(Regression, args_of(tmp_path, "--epochs", epochs, "--warmup-epochs", "5"))
    output = capsys.readouterr().out
    assert ("warning: the warm-up does not end within --epochs 3" in output) is warned


@pytest.mark.slow
def test_the_smaller_last_batch_of_an_evaluation_compiles_nothing_again():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images = torch.randn(11, 3, 2, 2)
    batches = [Batch(part, torch.zeros(len(part), dtype=torch.long), None) for part in images.split(4)]
    results = []
    for _ in range(2):
        loader = LoaderOf(batches)
        results.append(evaluate(model, loader, Distributed(), Precision(torch.device("cpu"), torch.float32, None)))
        model.compile(backend=backend)
    assert results[0] == pytest.approx(results[1]) and results[1]["images"] == 11 and len(compiled) == 1


class LoaderOf(list):
    """An evaluation loader of given batches."""

    skipped = {}

    @property
    def rounds(self):
        return len(self)


@pytest.mark.slow
def test_a_run_stops_after_epochs_without_a_better_score_and_stays_stopped(tmp_path, capsys):
    flags = ["--epochs", "9", "--early-stop", "2", "--lr", "0"]  # the first epoch stays the best
    assert len(train(tmp_path, *flags)) == 3
    assert len(train(tmp_path, *flags, "--resume", "auto")) == 3
    assert "--early-stop 2 ended this run" in capsys.readouterr().out
