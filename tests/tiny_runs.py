"""Runs of seconds on a few handwritten digits, in this process."""

import json
import shlex

import torch

import main_spectformer
from models.checkpoints import read_checkpoint

# 2 classes, some 290 images: 4 steps of 64 an epoch.
DIGITS = shlex.split(
    "--classes 0,7 --input-size 32 --batch-size 64 --num-workers 0 --aa none --color-jitter 0 --unscale-lr "
    "--warmup-epochs 0 --lr 3e-3"
)
TINY = [*DIGITS, "--arch", "spectformer-ti", "--model-kwargs", "embed_dim=32", "depth=2", "alpha=1", "num_heads=2"]
TINY_SVT = [
    *DIGITS,
    *shlex.split(
        "--arch svt-s --model-kwargs stem_width=8 embed_dims=(8,16,16,16) depths=(1,1,1,1) spectral_depths=(1,0,0,0) "
        "num_heads=(1,1,1,1) mlp_ratios=(2,2,2,2)"
    ),
]
CLOCK = ("seconds", "images_per_second", "wait_seconds", "memory_gib")


def train(directory, *flags, model=TINY, main=main_spectformer.main):
    main([*model, "--output-dir", str(directory), *flags])
    return rows(directory)


def rows(directory):
    return [json.loads(line) for line in (directory / "log.txt").read_text().splitlines()]


def timeless(log):
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in log]


def last(directory):
    return read_checkpoint(directory / "checkpoint_last.pth")


def assert_same(a, b):
    """Bit for bit, through dicts and lists."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b
