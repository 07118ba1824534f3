"""Tests for a GPU: a real one, or the pretended one that `tests/gpu/run.py` adds to every process.

Without either, every test is skipped. `real` tests need a real GPU, `pretended` ones count what only the pretended one counts.
"""
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parent))

import pytest  # noqa: E402
import torch  # noqa: E402

PRETENDED = hasattr(torch.cuda, "is_available") and "pretend_gpu" in sys.modules
NO_GPU = "needs a GPU: python tests/gpu/run.py pretends one"


def pytest_configure(config):
    config.addinivalue_line("markers", "real: needs a real GPU")
    config.addinivalue_line("markers", "pretended: needs the pretended GPU, which counts operations and waits")


def pytest_collection_modifyitems(config, items):
    here = [item for item in items if HERE in item.path.parents]
    for item in here:
        if not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason=NO_GPU))
        elif PRETENDED and "real" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a real GPU, and this one is pretended"))
        elif not PRETENDED and "pretended" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="counts what only the pretended GPU counts"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture
def whole_memory():
    "Afterwards all of the memory may be used again."
    yield
    torch.cuda.set_per_process_memory_fraction(1.)
    torch.cuda.empty_cache()
