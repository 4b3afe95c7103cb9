"""Shared settings of the tests: one thread per process, so that figures do not depend on the machine."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)
RELIABILITY = Path(__file__).with_name("reliability")


def pytest_collection_modifyitems(items):
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.path.is_relative_to(RELIABILITY):
            item.add_marker("slow")
