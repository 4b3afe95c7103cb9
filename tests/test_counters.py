"""`count_flops` beside the counters of others: docs/use.md says what they miss."""

import logging

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from ptflops import get_model_complexity_info
from small_models import KINDS, create, images
from torch.utils.flop_counter import FlopCounterMode

from models.flops import FORMULAS, count_flops, flops_by_kind

FOURIER = {operation for operation in FORMULAS if "_fft" in str(operation)}


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_torchs_counter_misses_fourier_transforms_alone(name):
    model = create(name).eval().to("meta")
    with FlopCounterMode(display=False) as plain, torch.no_grad():
        model(images(batch=1).to("meta"))
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as complete, torch.no_grad():
        model(images(batch=1).to("meta"))
    fourier = sum(flops for kind, flops in complete.get_flop_counts()["Global"].items() if kind in FOURIER)
    assert (plain.get_total_flops() + fourier) // 2 == pytest.approx(count_flops(model, 64), abs=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_fvcore_counts_the_same_layers(name, caplog):
    caplog.set_level(logging.ERROR)
    model = create(name).eval()
    counted = FlopCountAnalysis(model, images(batch=1)).by_operator()
    assert counted["conv"] + counted["linear"] == flops_by_kind(model, 64)["layers"]
    assert set(counted) <= {"conv", "linear", "layer_norm", "batch_norm", "bmm"}


@pytest.mark.parametrize("name", KINDS)
def test_ptflops_misses_fourier_transforms_and_attentions_products_and_counts_norms(name, capsys):
    model = create(name).eval()
    counted, _ = get_model_complexity_info(model, (3, 64, 64), as_strings=False, print_per_layer_stat=False)
    kinds = flops_by_kind(model, 64)
    products = kinds["spectral"] if "svt" in name else 0
    assert 0 <= counted - kinds["layers"] - products <= 0.06 * counted
