"""What only a GPU shows: the same results as on a CPU, mixed precision, compilation, NCCL.

Skipped without a CUDA device.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from test_original_checkpoints import VARIANTS, expected, images, original_weights

import engine
import main_spectformer
from models import load_weights, sample_mix_box
from models.spectral_gate import SpectralGate
from models.wavelet import analyse, synthesise

pytestmark = pytest.mark.cuda
ROOT = Path(__file__).resolve().parent.parent
DIGITS = [
    "--classes",
    "0,1,7",
    "--input-size",
    "32",
    "--batch-size",
    "64",
    "--num-workers",
    "2",
    "--arch",
    "spectformer-ti",
    "--model-kwargs",
    "embed_dim=64",
    "depth=2",
    "alpha=1",
    "num_heads=2",
    "--epochs",
    "2",
    "--aa",
    "none",
    "--device",
    "cuda",
]


@pytest.fixture(autouse=True)
def without_tf32():
    """Products and convolutions in float32 proper: the pyramids' logits differ by 3e-3 with TF32."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    yield
    for switch, precision in zip(switches, before, strict=True):
        switch.fp32_precision = precision


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gpu_gives_the_original_results(variant):
    name, arguments = VARIANTS[variant]
    facts, arrays = expected(variant)
    model = timm.create_model(name, **arguments).eval()
    load_weights(model, original_weights(variant))
    with torch.no_grad():
        logits = model.cuda()(images(facts).cuda()).cpu()
    assert (logits - torch.from_numpy(arrays["logits"])).abs().max() <= 1e-3


@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_the_wavelet_reconstructs_in_float32_whatever_the_precision_of_products(precision):
    torch.backends.cuda.matmul.fp32_precision = precision
    x = torch.randn(2, 56, 56, 32, device="cuda", requires_grad=True)
    back = synthesise(*analyse(x), (56, 56))
    (gradient,) = torch.autograd.grad(back.square().sum(), x)
    assert (back - x).norm() <= 1e-5 * x.norm() and (gradient - 2 * x).norm() <= 1e-4 * x.norm()
    assert torch.backends.cuda.matmul.fp32_precision == precision


@pytest.mark.parametrize("grid", [(14, 14), (7, 5), (28, 28), (56, 40)])
def test_the_gate_in_bf16_is_the_fft_up_to_rounding(grid):
    gate = SpectralGate(32, grid).cuda()
    x = torch.randn(4, *grid, 32, device="cuda", requires_grad=True)
    found = []
    for amp in (True, False):
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = gate(x)
        found.append((y.float(), *torch.autograd.grad(y.float().square().sum(), (x, gate.complex_weight))))
    assert all((half - full).norm() <= 0.02 * full.norm() for half, full in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["spectformer_ti", "spectformer_h_s", "svt_h_s"])
def test_a_training_step_compiles_without_a_graph_break(name):
    arguments = {} if name == "spectformer_ti" else {"token_label": True}
    model = timm.create_model(name, **arguments).cuda().train()
    model.compile(fullgraph=True)
    extra = {"box": sample_mix_box(model.token_label_size, torch.device("cuda"))} if arguments else {}
    with torch.autocast("cuda", torch.bfloat16):
        output = model(torch.randn(4, 3, 224, 224, device="cuda"), **extra)
    logits = [output] if isinstance(output, torch.Tensor) else output[:2]
    sum(part.float().sum() for part in logits).backward()
    assert all(torch.isfinite(weight.grad).all() for weight in model.parameters())


@pytest.fixture
def digits():
    """Flags of a short training, whose data come with scikit-learn."""
    pytest.importorskip("sklearn")
    return DIGITS


@pytest.mark.parametrize("amp", ["bf16", "fp16", "none"])
def test_training_learns_in_every_precision(digits, tmp_path, amp):
    main_spectformer.main([*digits, "--amp", amp, "--channels-last", "--output-dir", str(tmp_path)])
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert log[-1]["train_loss"] < log[0]["train_loss"] and math.isfinite(log[-1]["test_loss"])


def test_an_fp16_overflow_is_skipped_and_counted(digits, tmp_path, monkeypatch):
    original = engine.update

    def overflowing(trainer, loss, batches, step):
        if step == 2:
            next(trainer.model.parameters()).grad.fill_(math.inf)
        return original(trainer, loss, batches, step)

    monkeypatch.setattr(engine, "update", overflowing)
    main_spectformer.main([*digits, "--amp", "fp16", "--output-dir", str(tmp_path)])
    log = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert all(row["overflows"] >= 1 and math.isfinite(row["grad_norm"]) for row in log)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two devices for two processes")
def test_two_processes_train_over_nccl(digits, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "main_spectformer.py",
        *digits,
        "--output-dir",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 2
