"""tools.estimate_gpu: bytes and arithmetic are those of the operations, and models can be compared."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from models import ModelError
from tools import estimate_gpu


def test_a_product_counts_what_it_reads_writes_and_multiplies():
    with FakeTensorMode(), estimate_gpu.Traffic() as traffic:
        one, other = torch.empty(4096, 2048, dtype=torch.bfloat16), torch.empty(2048, 1024, dtype=torch.bfloat16)
        _ = one @ other
    assert traffic.bytes == {"mm": 2 * (4096 * 2048 + 2048 * 1024 + 4096 * 1024)} and traffic.kernels == {"mm": 1}
    assert traffic.seconds == pytest.approx(2 * 4096 * 2048 * 1024 / estimate_gpu.PRODUCTS)


def test_small_operations_cost_a_launch_views_nothing_and_an_expanded_axis_is_read_once():
    with FakeTensorMode(), estimate_gpu.Traffic() as traffic:
        _ = torch.empty(8, 1).expand(8, 1000).T + 1
    assert traffic.bytes == {"add": 4 * (8 + 8000)}
    assert traffic.seconds == pytest.approx(estimate_gpu.LAUNCH)


@pytest.mark.slow
def test_models_are_estimated_side_by_side(capsys):
    names = ["spectformer_h_n", "svt_h_n", "deit_tiny_patch16_224"]
    estimate_gpu.main([*names, "--batch-size", "2", "--img-size", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == names
    assert all(float(line.split()[3]) > 0 for line in lines[1:])


@pytest.mark.slow
def test_half_precision_runs_no_fourier_transform():
    operations = estimate_gpu.training_step("spectformer_h_n", 2, 32).bytes
    assert "bmm" in operations and not [name for name in operations if name.startswith("_fft")]


def test_an_unknown_model_is_the_users_mistake():
    with pytest.raises(ModelError, match="no_such_model: no such model"):
        estimate_gpu.main(["no_such_model"])
