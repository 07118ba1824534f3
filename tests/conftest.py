import json
import os
import subprocess
import sys
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
    from rlhf_nb.testing import save_tiny
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    "Run the program, or Python code with arguments, in several processes; their exit status and what they said."
    server = subprocess.Popen([sys.executable, ROOT/"tests"/"ranks.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))

    def run(*flags, world=2, env=None, code=None, rank=1, update=0, what=""):
        case = dict(flags=[str(f) for f in flags], world=world, env=env or {}, code=code, rank=rank, update=update,
                    what=what, out=str(tmp_path_factory.mktemp("logs")))
        print(json.dumps(case), file=server.stdin, flush=True)
        found = json.loads(server.stdout.readline())
        print(found)
        return found
    yield run
    server.stdin.close()
    server.wait()


@pytest.fixture
def together(ranks):
    "The same where nothing goes wrong; what all said."
    def run(*flags, **how):
        found = ranks(*flags, **how)
        assert not any(found["status"]), "\n".join(found["said"])
        return "".join(found["said"])
    return run
