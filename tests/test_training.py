"""Training end to end on a few handwritten digits, in this process."""

import json
import math
import os
import shlex
import shutil
import signal

import pytest
import torch
from tiny_runs import DIGITS, TINY, TINY_SVT, assert_same, last, rows, timeless, train
from torch import nn

import engine
import main_spectformer
import main_svt
from inputs.loader import Batch
from models import ModelError, create_model
from runtime.processes import Distributed
from training import classification, optimizer
from training.classification_flags import FLAGS
from training.model import count_parameters
from training.options import parse_args
from training.precision import Precision
from training.resume import with_global_batch
from utils import Interrupted, NonFiniteError, UserError


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """They take as long as the training does here."""
    monkeypatch.setattr(engine.RunDirectory, "_draw", lambda *_: None)


def trained_state(directory):
    state = last(directory)
    return {
        name: state[name]
        for name in ("model", "model_ema", "optimizer", "epoch", "step", "updates", "meters", "best_acc1", "best_epoch")
        if name in state
    }


def signal_at(monkeypatch, function, call, signum=signal.SIGTERM):
    """Send this process a signal during the given call of a function of the engine's or of classification's."""
    module = engine if hasattr(engine, function) else classification
    original, calls = getattr(module, function), []

    def watched(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, function, watched)
    return calls


@pytest.mark.slow
def test_a_run_learns_and_leaves_its_files(tmp_path):
    log = train(tmp_path, "--epochs", "3", "--mixup", "0", "--cutmix", "0", "--checkpoint-epochs", "2")
    assert log[-1]["train_loss"] < log[0]["train_loss"] - 0.1
    columns = {"train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters"}
    assert columns <= set(log[0])
    assert [row["epoch"] for row in log] == [0, 1, 2]
    names = {path.name for path in tmp_path.iterdir()}
    assert {"checkpoint_last.pth", "checkpoint_best.pth", "checkpoint_0002.pth", "args.yaml"} <= names
    state = torch.load(tmp_path / "checkpoint_best.pth", weights_only=True)
    assert state["arch"] == "spectformer_ti" and state["class_names"] == ["0", "7"]
    assert state["best_acc1"] == max(row["test_acc1"] for row in log)
    assert state["model_kwargs"]["embed_dim"] == 32 and state["input_size"] == [32, 32]


RESUMED = shlex.split(
    "--epochs 2 --batch-size 32 --accum-iter 2 --drop-path 0.2 --model-ema --model-ema-decay 0.9 --model-ema-warmup"
)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return train(directory, *RESUMED), trained_state(directory)


@pytest.mark.slow
@pytest.mark.parametrize(("function", "call"), [("step_loss", 13), ("count", 2), ("count", 5), ("log_row", 1)])
def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch, uninterrupted, function, call):
    """Within an accumulation, in evaluation (the model's, the average's), between two epochs."""
    with monkeypatch.context() as patch:
        signal_at(patch, function, call)
        with pytest.raises(Interrupted) as caught:
            train(tmp_path, *RESUMED)
    assert caught.value.exit_code == 143
    log = train(tmp_path, *RESUMED, "--resume", "auto")
    assert timeless(log) == timeless(uninterrupted[0])
    assert_same(trained_state(tmp_path), uninterrupted[1])


@pytest.mark.slow
def test_a_crash_after_the_row_leaves_every_row_once(tmp_path, monkeypatch):
    """Killed between log and checkpoint: the epoch is trained again, from the checkpoint within it."""

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    expected = train(tmp_path / "whole", "--epochs", "2")
    with monkeypatch.context() as patch:
        patch.setattr(engine.RunDirectory, "save_epoch", killed)
        with pytest.raises(Killed):
            train(tmp_path / "killed", "--epochs", "2", "--checkpoint-steps", "3")
    assert len(rows(tmp_path / "killed")) == 1 and last(tmp_path / "killed")["step"] == 3
    assert timeless(train(tmp_path / "killed", "--epochs", "2", "--resume", "auto")) == timeless(expected)


@pytest.mark.slow
def test_an_image_that_makes_its_own_logits_nan_is_the_one_named(tmp_path, monkeypatch):
    original = classification.as_input

    def poisoned(images, *args):
        images = original(images, *args).clone()
        if len(images) == 64:
            images[5] = math.nan
        return images

    monkeypatch.setattr(classification, "as_input", poisoned)
    with pytest.raises(NonFiniteError) as caught:
        train(tmp_path, "--epochs", "1", "--mixup", "0", "--cutmix", "0")
    assert str(caught.value).count("DIGITS/train[") == 1


@pytest.mark.slow
def test_an_fp16_overflow_skips_the_update_and_nothing_else_moves(tmp_path, monkeypatch):
    original, seen = engine.update, []

    def overflowing(trainer, loss, batches, step):
        if step == 2:
            next(trainer.model.parameters()).grad.fill_(math.inf)
            before = [p.detach().clone() for p in trainer.ema.module.parameters()], trainer.scaler.get_scale()
        result = original(trainer, loss, batches, step)
        if step == 2:
            after = list(trainer.ema.module.parameters())
            seen.append(all(torch.equal(a, b) for a, b in zip(before[0], after, strict=True)))
            seen.append(trainer.scaler.get_scale() < before[1])
        return result

    monkeypatch.setattr(engine, "update", overflowing)
    (row,) = train(tmp_path, "--epochs", "1", "--amp", "fp16", "--model-ema")
    assert seen == [True, True]
    assert row["overflows"] == 1 and last(tmp_path)["updates"] == 3 and math.isfinite(row["grad_norm"])


@pytest.mark.slow
def test_an_fp16_gradient_that_overflows_at_the_smallest_scale_ends_the_run(tmp_path, monkeypatch):
    original, scales = engine.update, []

    def overflowing(trainer, loss, batches, step):
        scales.append(trainer.scaler.get_scale())
        next(trainer.model.parameters()).grad.fill_(math.inf)
        return original(trainer, loss, batches, step)

    monkeypatch.setattr(engine, "update", overflowing)
    with pytest.raises(NonFiniteError, match="the gradient's norm is inf; no weight was changed"):
        train(tmp_path, "--epochs", "99", "--amp", "fp16", "--checkpoint-epochs", "0")
    assert scales == [2.0**power for power in range(16, -15, -1)]


EXACT = ["--dtype", "float64", "--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--epochs", "1"]


def largest_difference(a, b):
    return max((a[name] - b[name]).abs().max().item() for name in a if a[name].is_floating_point())


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY, [*TINY_SVT, "--freeze-bn"]], ids=["vanilla", "pyramid"])
def test_accumulation_checkpointing_and_layout_leave_the_weights_the_same(tmp_path, model):
    ways = {
        "plain": [],
        "accumulated": ["--batch-size", "16", "--accum-iter", "4"],
        "saving": ["--grad-checkpointing", "--channels-last"],
    }
    for name, flags in ways.items():
        train(tmp_path / name, *EXACT, *flags, model=model)
    plain = last(tmp_path / "plain")["model"]
    for name in ("accumulated", "saving"):
        assert largest_difference(plain, last(tmp_path / name)["model"]) <= 1e-10
    with pytest.raises(UserError, match="--grad-checkpointing: pit_ti_224 does not support it"):
        train(tmp_path / "pit", "--grad-checkpointing", model=["--arch", "pit_ti_224"])


@pytest.mark.slow
@pytest.mark.parametrize(("decay", "averaged"), [("0", True), ("0.99996", False)])
def test_the_best_goes_by_the_weights_or_their_average_whichever_is_better(tmp_path, decay, averaged):
    """Without decay they are the same; with the default one a short run's average is hardly trained."""
    flags = ["--epochs", "2", "--mixup", "0", "--cutmix", "0", "--model-ema", "--model-ema-decay", decay]
    log = train(tmp_path, *flags)
    better = max(row[name] for row in log for name in ("test_acc1", "test_acc1_ema"))
    state = last(tmp_path)
    assert state["best_acc1"] == better and state["averaged"] is averaged
    assert better > 70  # that the average of a short run has not


@pytest.mark.slow
def test_evaluation_alone_has_the_figures_of_the_weights_and_of_their_average_and_writes_nothing(tmp_path, capsys):
    flags = ["--mixup", "0", "--cutmix", "0", "--model-ema"]
    (row,) = train(tmp_path, "--epochs", "1", *flags)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    train(tmp_path, "--eval", "--resume", str(tmp_path / "checkpoint_last.pth"))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["test_loss"] != row["test_loss_ema"]
    for name in ("loss", "loss_ema", "acc1", "acc1_ema"):
        assert found[name] == pytest.approx(row[f"test_{name}"], rel=1e-6)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    directory = tmp_path_factory.mktemp("one_epoch")
    train(directory, "--epochs", "1")
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--arch", "spectformer-xs"], "its arch is spectformer_ti, this run's is spectformer_xs"),
        (["--classes", "0,1,7"], "num_classes is 2, this run's is 3"),
        (["--input-size", "48"], "input_size"),
        (["--model-kwargs", "embed_dim=32", "depth=3", "alpha=1"], "its model_kwargs is"),
        (["--model-ema"], "its model_ema is False"),
        (["--opt", "sgd"], "its opt is adamw"),
        (["--batch-size", "32"], "updates have 64 images, --batch-size 64 x --accum-iter 1.*--finetune"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_an_error_and_kept(tmp_path, one_epoch, flags, expected):
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    before = (tmp_path / "checkpoint_last.pth").read_bytes()
    with pytest.raises(UserError, match=expected):
        train(tmp_path, "--epochs", "2", *flags, "--resume", "auto")
    assert (tmp_path / "checkpoint_last.pth").read_bytes() == before


@pytest.mark.parametrize("name", ["nmuon", "lookahead_lamb", "nadamw"])
def test_runs_of_every_kind_of_optimiser_resume(tmp_path, monkeypatch, name):
    """Of Muon with filters too, which look like matrices to it and are none."""
    flags, model = ["--epochs", "2", "--opt", name], [*TINY, "patch_size=8"]
    log = train(tmp_path / "whole", *flags, model=model)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(patch, "step_loss", 6)
        train(tmp_path / "stopped", *flags, model=model)
    assert timeless(train(tmp_path / "stopped", *flags, "--resume", "auto", model=model)) == timeless(log)
    assert_same(trained_state(tmp_path / "stopped"), trained_state(tmp_path / "whole"))


def test_a_run_saved_on_one_kind_of_device_resumes_on_another(tmp_path, monkeypatch):
    """CUDA's optimiser is fused, a CPU's is not: that belongs to the machine. torch has a fused one for CPUs, too."""
    create = optimizer.create_optimizer_v2
    for first, second in ((False, True), (True, False)):
        directory = tmp_path / str(first)
        for epochs, fused in ((1, first), (2, second)):
            with monkeypatch.context() as patch:
                patch.setattr(optimizer, "create_optimizer_v2", lambda *a, f=fused, **k: create(*a, **k | {"fused": f}))
                train(directory, "--epochs", str(epochs), "--resume", "auto")
        assert last(directory)["updates"] == 8


@pytest.mark.slow
def test_resume_takes_a_run_directory_with_the_flags_it_was_started_with(tmp_path, one_epoch, monkeypatch):
    shutil.copytree(one_epoch, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    main_svt.main(["--resume", str(tmp_path / "run"), "--epochs", "2"])
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [0, 1]
    assert last(tmp_path / "run")["model_kwargs"]["embed_dim"] == 32
    with pytest.raises(UserError, match="no checkpoint in this directory"):
        main_svt.main(["--resume", str(tmp_path), "--output-dir", str(tmp_path / "new")])


def test_resuming_where_later_checkpoints_would_be_lost_is_refused(tmp_path):
    expected = train(tmp_path / "run", "--epochs", "2", "--checkpoint-epochs", "1")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    first = str(tmp_path / "run" / "checkpoint_0001.pth")
    with pytest.raises(UserError, match=r"checkpoint_last.pth is further in training .* --output-dir"):
        train(tmp_path / "run", "--epochs", "2", "--resume", first)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before
    assert timeless(train(tmp_path / "other", "--epochs", "2", "--resume", first)) == timeless(expected[1:])
    main_spectformer.main([*TINY, "--output-dir", str(tmp_path / "run"), "--eval", "--resume", first])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--classes", "7,0"], r"its class_names is \['0', '7'\], this run's is \['7', '0'\]"),
        (["--repeated-aug"], "its repeated_aug is False, this run's is True"),
    ],
)
def test_other_samples_are_not_trained_on_after_a_stop(tmp_path, one_epoch, flags, expected):
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    with pytest.raises(UserError, match=expected):
        train(tmp_path, "--epochs", "2", *flags, "--resume", "auto")


@pytest.mark.slow
def test_another_seed_is_refused_in_the_middle_of_an_epoch_alone(tmp_path, one_epoch, monkeypatch):
    shutil.copytree(one_epoch, tmp_path, dirs_exist_ok=True)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(patch, "step_loss", 2)
        train(tmp_path, "--epochs", "2", "--resume", "auto", "--seed", "5")
    with pytest.raises(UserError, match="its seed is 5, this run's is 6"):
        train(tmp_path, "--epochs", "2", "--resume", "auto", "--seed", "6")


def test_a_model_is_not_evaluated_on_other_classes(one_epoch):
    checkpoint = str(one_epoch / "checkpoint_last.pth")
    with pytest.raises(UserError, match="the classes of .*checkpoint_last.pth differ"):
        train(one_epoch, "--eval", "--resume", checkpoint, "--classes", "7,0")


def test_weights_alone_cannot_be_resumed(tmp_path):
    torch.save({"model": {"head.weight": torch.zeros(1)}}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="--finetune starts a new run"):
        train(tmp_path / "run", "--epochs", "1", "--resume", str(tmp_path / "weights.pth"))


@pytest.mark.parametrize(("processes", "expected"), [(1, (8, 4)), (2, (8, 2)), (3, None), (4, (8, 1)), (8, (4, 1))])
def test_another_number_of_processes_keeps_the_images_of_an_update(processes, expected):
    """From 4 processes of 8: mixup wants even batches, nobody gets a larger one than asked for."""
    args = parse_args(FLAGS, ["--batch-size", "8", "--resume", "file.pth"])
    state = {"args": {"batch_size": 8, "accum_iter": 1}, "world_size": 4}
    dist = Distributed(world_size=processes)
    if expected is None:
        with pytest.raises(UserError, match="updates have 32 images, .*; 3 processes with --batch-size 8 or less"):
            with_global_batch(args, state, dist)
    else:
        args = with_global_batch(args, state, dist)
        assert (args.batch_size, args.accum_iter) == expected


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["test_resnet", "test_vit"])
def test_any_timm_model_trains(tmp_path, arch):
    (row,) = train(tmp_path, "--epochs", "1", model=[*DIGITS, "--arch", arch])
    assert row["n_parameters"] == count_parameters(create_model(arch, 2, (32, 32), {}))


@pytest.mark.parametrize(
    ("arch", "kwargs", "expected"),
    [
        ("spectformer_xl", {}, "did you mean spectformer_xs"),
        ("spectformer_ti", {"dept": 3}, "dept"),
        ("spectformer_ti", {"embed_dim": 30, "num_heads": 4}, "30"),
        ("test_vit", {"depths": 3}, "depths"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_one_line_error(arch, kwargs, expected):
    with pytest.raises(ModelError, match=expected) as caught:
        create_model(arch, 10, (32, 32), kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_teacher_of_timm_distils_from_a_file(tmp_path, kind):
    teacher = create_model("test_vit", 2, (32, 32), {})
    torch.save(teacher.state_dict(), tmp_path / "teacher.pth")
    flags = [
        "--distillation-type",
        kind,
        "--teacher-model",
        "test_vit",
        "--teacher-path",
        str(tmp_path / "teacher.pth"),
    ]
    (row,) = train(tmp_path / "run", "--epochs", "1", *flags)
    assert math.isfinite(row["train_loss"])
    assert not any("teacher" in name for name in last(tmp_path / "run")["model"])


class Batches(list):
    """As a loader gives them."""

    rounds = property(len)
    skipped = ()


def test_evaluation_counts_hits_among_the_first_one_and_five():
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5, 6], [1, 9, 8, 7, 6, 5, 4], [1, 2, 3, 4, 5, 6, 7]])
    targets = torch.tensor([0, 2, 0])
    loss, correct1, correct5, images = classification.count(logits, targets).tolist()
    assert (correct1, correct5, images) == (1, 2, 3)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, targets).item() * 3)
    exact = Precision(torch.device("cpu"), torch.float32, None)
    loader = Batches([Batch(logits, targets, torch.arange(3))])
    found = classification.evaluate(nn.Identity(), loader, Distributed(), exact)
    shares = {"loss": loss / 3, "acc1": 100 / 3, "acc5": 200 / 3}
    assert found == {name: pytest.approx(share) for name, share in shares.items()} | {
        "correct1": 1,
        "correct5": 2,
        "images": 3,
    }
