import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent/"shared"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with --slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"): return
    for item in items:
        if "slow" in item.keywords: item.add_marker(pytest.mark.skip(reason="needs --slow"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    "A policy and a reward model in folders."
    from rlhf_nb.tiny import save_tiny
    return save_tiny(tmp_path_factory.mktemp("tiny"))
