"""Real jobs of two and three gloo processes, through the launchers that the README names."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import TINY, TINY_SVT, last, rows, train

ROOT = Path(__file__).parent.parent
# 288 images to train on, 5 updates of 56; 71 to evaluate, which neither 2 nor 3 divides.
EXACT = shlex.split("--classes 0,2 --dtype float64 --mixup 0 --cutmix 0 --drop-path 0 --epochs 1 --unscale-lr")


def launch(module, processes, *flags):
    """Run main_spectformer.py in a job; returns what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = [f"--nproc_per_node={processes}", f"--master_port={port}"]
    words = [sys.executable, "-m", *module, *job, "main_spectformer.py", *flags]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "Grad strides do not match" not in done.stderr  # of depthwise weights, whose memory is the same
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("model", [TINY, [*TINY_SVT, "--freeze-bn", "--accum-iter", "2"]], ids=["vanilla", "pyramid"])
def test_two_processes_train_the_weights_of_one_with_twice_the_batch(tmp_path, model):
    (single,) = train(tmp_path / "one", *EXACT, "--batch-size", "56", "--accum-iter", "1", model=model)
    batch = ["--batch-size", "14" if "--accum-iter" in model else "28"]
    launch(["torch.distributed.run"], 2, *model, *EXACT, "--output-dir", str(tmp_path / "two"), *batch)
    (double,) = rows(tmp_path / "two")
    a, b = last(tmp_path / "one")["model"], last(tmp_path / "two")["model"]
    assert last(tmp_path / "two")["updates"] == 5
    assert max((a[name] - b[name]).abs().max().item() for name in a if a[name].is_floating_point()) <= 1e-10
    assert double["train_loss"] == pytest.approx(single["train_loss"], abs=1e-10)
    assert [double[f"test_{name}"] for name in ("correct1", "correct5", "images")] == [
        single[f"test_{name}"] for name in ("correct1", "correct5", "images")
    ]


@pytest.mark.slow
def test_three_processes_of_the_older_launcher_evaluate_every_image_once(tmp_path):
    (row,) = train(tmp_path, *EXACT)
    flags = ["--batch-size", "16", "--eval", "--resume", str(tmp_path / "checkpoint_last.pth")]
    printed = launch(["torch.distributed.launch", "--use_env"], 3, *TINY, *EXACT, *flags)
    (found,) = (json.loads(line) for line in printed.splitlines() if line.startswith("{"))
    assert (found["correct1"], found["images"]) == (row["test_correct1"], 71)
    assert found["loss"] == pytest.approx(row["test_loss"], abs=1e-10)
