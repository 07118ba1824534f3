"Killed, stopped, out of memory, out of disk, fed with NaN: what is left is right."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.slow)])
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path, kills):
    run = subprocess.run([sys.executable, ROOT/"tests"/"kill.py", tmp_path/"runs", str(kills), "0"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["while_writing"] > 0
    print(found)
