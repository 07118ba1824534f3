"""Tests for a GPU: a real one, or the pretended one that `tests/gpu/run.py` adds to every process.

Without either, every test is skipped. `real` tests need a real GPU, and `pretended` ones what only the pretended one
counts.
"""
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
HERE = Path(__file__).parent
PRETENDED = "pretend_gpu" in sys.modules


def pytest_configure(config):
    config.addinivalue_line("markers", "real: needs a real GPU")
    config.addinivalue_line("markers", "pretended: needs the pretended GPU, which counts operations and waits")


def reason_to_skip(item) -> str | None:
    "Why a test cannot run here; None: it can."
    if not torch.cuda.is_available(): return "needs a GPU; python tests/gpu/run.py pretends one"
    if PRETENDED and "real" in item.keywords: return "needs a real GPU, and this one is pretended"
    if not PRETENDED and "pretended" in item.keywords: return "needs what only the pretended GPU counts"
    return None


def pytest_collection_modifyitems(config, items):
    for item in items:
        if HERE not in item.path.parents: continue
        if reason := reason_to_skip(item): item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fresh_device():
    "Every test begins with all of the memory, and a peak of its own."
    if not torch.cuda.is_available(): return
    torch.cuda.set_per_process_memory_fraction(1.)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
