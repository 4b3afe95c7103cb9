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
from training.optimizer import build_optimizer, build_scheduler, highest_rate
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
    assert rates[3:] == [args.min_lr] * 2 and rates[2] > args.min_lr


@pytest.mark.parametrize(("warmup", "expected"), [(5, 1.0), (40, 0.5)], ids=["ends", "never ends"])
def test_the_highest_rate_of_a_schedule_of_any_length_is_found_at_once(warmup, expected):
    args = parse("--epochs", "20", "--warmup-epochs", str(warmup), "--warmup-lr", "0", "--sched-on-updates")
    assert highest_rate(args, 1.0, updates_per_epoch=10**8) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("stepped", ["--sched-on-updates", "--no-sched-on-updates"])
@pytest.mark.parametrize("warmup", ["0", "2", "9"])
def test_the_highest_rate_is_the_highest_of_the_run(warmup, stepped):
    args = parse("--epochs", "4", "--warmup-epochs", warmup, stepped)
    optimizer = torch.optim.SGD(tiny().parameters(), lr=1.0)
    scheduler = build_scheduler(args, optimizer, updates_per_epoch=3)
    rates = [optimizer.param_groups[0]["lr"]]
    for number in range(11 if args.sched_on_updates else 3):
        (scheduler.step_update if args.sched_on_updates else scheduler.step)(number)
        rates.append(optimizer.param_groups[0]["lr"])
    assert highest_rate(args, 1.0, updates_per_epoch=3) == max(rates)


@pytest.mark.parametrize(
    ("processes", "words", "expected"),
    [
        (1, [], 5e-4 * 128 / 512),
        (3, ["--accum-iter", "4"], 5e-4 * 128 * 3 * 4 / 512),
        (8, ["--unscale-lr"], 5e-4),
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
    for name in ("adamw", "sgd"):
        build_optimizer(parse("--opt", name), tiny(), Distributed())
    given = ("--opt-betas", "0.8", "0.95")
    groups = build_optimizer(parse(*given), tiny(), Distributed()).param_groups
    assert {group["betas"] for group in groups} == {(0.8, 0.95)}
    with pytest.raises(UserError, match="--opt-betas: --opt sgd has none"):
        build_optimizer(parse("--opt", "sgd", *given), tiny(), Distributed())


@pytest.mark.parametrize(("name", "expected"), [("fusedlamb", "github.com/NVIDIA/apex"), ("adamww", "no such")])
def test_an_optimiser_that_is_not_there_says_what_to_do(monkeypatch, name, expected):
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match=expected):
        build_optimizer(parse("--opt", name), tiny(), Distributed())
