"""The learning rate over a run: the published one to the last digit, scaled by the images an update."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch

import models  # noqa: F401 (registers them)
from runtime.processes import Distributed
from training.classification_flags import FLAGS
from training.optimizer import build_optimizer, build_scheduler
from training.options import parse_args
from utils import UserError

GOLDEN = json.loads((Path(__file__).parent / "golden/lr_schedule.json").read_text())


def parse(*words):
    return parse_args(FLAGS, words)


def tiny():
    return torch.nn.Linear(2, 2)


def test_published_learning_rates_come_out_for_all_epochs():
    args = parse("--epochs", "320", "--batch-size", str(GOLDEN["batch_size_per_gpu"]))
    optimizer = build_optimizer(args, tiny(), Distributed(world_size=GOLDEN["gpus"]))
    scheduler = build_scheduler(args, optimizer, updates_per_epoch=4)
    rates = []
    for epoch in range(args.epochs):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch)
    assert rates == pytest.approx(GOLDEN["train_lr"], rel=1e-12, abs=0)


@pytest.mark.parametrize("arch", ["spectformer_h_n", "svt_h_n", "svt_vanilla_ti"])
def test_muon_orthogonalises_matrices_of_linear_maps_and_nothing_else(arch):
    model = timm.create_model(arch, img_size=32)
    optimizer = build_optimizer(parse("--opt", "nmuon"), model, Distributed())
    names = {id(weight): name for name, weight in model.named_parameters()}
    by_muon = {
        names[id(weight)]
        for group in optimizer.param_groups
        for weight in group["params"]
        if not group.get("use_fallback") and weight.ndim > 1  # it takes no vectors anyway
    }
    assert {name.split(".")[-2] for name in by_muon} <= {
        *("qkv", "q", "kv", "proj", "fc1", "fc2", "head"),
        *("0", "3", "6"),  # the stem's convolutions
    }
    assert by_muon >= {name for name in names.values() if name.endswith(("fc1.weight", "fc2.weight"))}


def test_cooldown_runs_at_the_smallest_rate():
    args = parse("--epochs", "3", "--warmup-epochs", "1", "--cooldown-epochs", "2")
    optimizer = build_optimizer(args, tiny(), Distributed())
    scheduler = build_scheduler(args, optimizer, updates_per_epoch=4)
    rates = []
    for epoch in range(args.epochs + args.cooldown_epochs):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[3:] == [1e-5] * 2 and rates[2] > 1e-5


@pytest.mark.parametrize("given", [(), ("--min-lr", "1e-5", "--warmup-lr", "1e-6")], ids=["not given", "given"])
@pytest.mark.parametrize("images", [2, 8, 128])
def test_a_schedule_that_is_not_given_its_ends_never_rises_towards_the_last_epoch(images, given):
    args = parse("--epochs", "4", "--warmup-epochs", "1", "--batch-size", str(images), *given)
    optimizer = build_optimizer(args, tiny(), Distributed())
    scheduler = build_scheduler(args, optimizer, updates_per_epoch=3)
    rates = [scheduler._get_lr(epoch)[0] for epoch in range(5)]
    peak = 5e-4 * images / 512
    ends = (1e-6, 1e-5) if given else (min(1e-6, peak / 10), min(1e-5, peak / 10))
    assert (rates[0], rates[-1]) == pytest.approx(ends)
    assert given or rates[1:] == sorted(rates[1:], reverse=True)


@pytest.mark.parametrize("updates_per_epoch", [2, 700])
def test_a_warm_up_can_be_a_part_of_the_run_whatever_its_length(updates_per_epoch):
    args = parse("--epochs", "10", "--warmup-part", "0.2", "--sched-on-updates", "--lr", "1", "--unscale-lr")
    scheduler = build_scheduler(args, build_optimizer(args, tiny(), Distributed()), updates_per_epoch)
    rates = [scheduler._get_lr(update)[0] for update in range(10 * updates_per_epoch)]
    assert rates.index(max(rates)) == pytest.approx(2 * updates_per_epoch, abs=1)
    assert rates[updates_per_epoch] == pytest.approx(0.5, abs=1e-3)


def test_a_warm_up_of_a_single_update_is_left_out():
    args = parse("--epochs", "5", "--warmup-part", "0.1", "--sched-on-updates", "--lr", "1", "--unscale-lr")
    scheduler = build_scheduler(args, build_optimizer(args, tiny(), Distributed()), updates_per_epoch=2)
    assert scheduler._get_lr(0)[0] == 1.0


@pytest.mark.parametrize(
    ("sched", "expected"),
    [
        ("constant", [1.0] * 10),
        ("wsd", [1.0] * 8 + [1.0, 0.293]),
        ("plateau", [1.0] * 4 + [0.1] * 3 + [0.01] * 3),
    ],
)
def test_other_schedules_of_timm_are_at_hand(sched, expected):
    args = parse("--epochs", "10", "--sched", sched, "--warmup-epochs", "0", "--patience-epochs", "2", "--min-lr", "0")
    optimizer = torch.optim.SGD(tiny().parameters(), lr=1.0)
    scheduler = build_scheduler(args, optimizer, updates_per_epoch=3)
    rates = []
    for epoch in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1, 50.0)
    assert rates == pytest.approx(expected, abs=1e-3)


def test_a_schedule_that_does_not_fit_is_an_error_of_one_line():
    args = parse("--sched", "plateau", "--sched-on-updates")
    with pytest.raises(UserError, match="--sched plateau: Plateau LR only supports step per epoch"):
        build_scheduler(args, build_optimizer(args, tiny(), Distributed()), 3)


@pytest.mark.parametrize(
    ("processes", "words", "expected"),
    [
        (1, [], 5e-4 * 128 / 512),
        (3, ["--accum-iter", "4"], 5e-4 * 128 * 3 * 4 / 512),
        (8, ["--unscale-lr"], 5e-4),
        (2, ["--lr-scale", "sqrt", "--batch-size", "64"], 5e-4 / 2),
    ],
)
def test_the_rate_counts_processes_and_accumulation(processes, words, expected):
    optimizer = build_optimizer(parse(*words), tiny(), Distributed(world_size=processes))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-15)


def test_only_weights_with_two_axes_decay():
    groups = build_optimizer(parse(), tiny(), Distributed()).param_groups
    assert {group["weight_decay"]: [weight.ndim for weight in group["params"]] for group in groups} == {
        0.0: [1],
        0.05: [2],
    }


def test_betas_are_for_optimisers_that_have_some():
    given = ("--opt-betas", "0.8", "0.95")
    groups = build_optimizer(parse(*given), tiny(), Distributed()).param_groups
    assert {tuple(group["betas"]) for group in groups} == {(0.8, 0.95)}
    build_optimizer(parse("--opt", "sgd", *given), tiny(), Distributed())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fusedlamb", "APEX optimizers"),
        ("adamww", "--opt adamww: .*adamww"),
        ("adahessian", "--opt adahessian: it needs second"),
    ],
)
def test_an_optimiser_that_is_not_there_says_what_to_do(monkeypatch, name, expected):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=expected):
        build_optimizer(parse("--opt", name), tiny(), Distributed())
