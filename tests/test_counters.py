"""`count_flops` compared with torch's counter."""

import pytest
import torch
from small_models import KINDS, create, images
from torch.utils.flop_counter import FlopCounterMode

from models.flops import FORMULAS, count_flops

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
