"""Shared settings of the test-suite: one thread a process, so that figures do not depend on the machine."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)

# What `make test-fast` runs: they start no processes and train nothing, and take a minute on two cores.
FAST = {
    "test_checkpoints",
    "test_cli",
    "test_curves",
    "test_losses",
    "test_mixers",
    "test_models",
    "test_original_checkpoints",
    "test_resampling",
    "test_run_directory",
    "test_sampler",
    "test_schedule",
    "test_schema",
    "test_token_labels",
    "test_tools",
    "test_untrusted_checkpoints",
    "test_utils",
    "test_wavelet",
}


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.path.stem in FAST:
            item.add_marker("fast")
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip)
