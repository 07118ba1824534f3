"What `pip install .` puts on a machine, without nbdev."
import os
import subprocess
import sys

import pytest
from conftest import ROOT

BLOCK = "import sys\nfor name in ('nbdev', 'fastcore', 'execnb'): sys.modules[name] = None\n"


def installed(target, *command):
    env = {**os.environ, "PYTHONPATH": str(target)}
    run = subprocess.run([sys.executable, *command], cwd=target, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_installed_package_works_away_from_the_checkout(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    where = "import rlhf_nb.trainer, rlhf_nb.testing as t, rlhf_nb.cli as c\n"
    where += "print(rlhf_nb.__file__, t.data_dir(), len(t.shipped_rows()), *c.CONFIGS)"
    file, data, rows, *configs = installed(tmp_path, "-c", BLOCK + where).split()
    assert configs == ["ddp", "fsdp2", "zero2", "zero3"]
    assert file.startswith(str(tmp_path)) and data.startswith(str(tmp_path)) and int(rows) >= 300
    assert "train" in installed(tmp_path, "-c", BLOCK + "from rlhf_nb.program import main; main(['--help'])")


@pytest.mark.slow
def test_empty_venv(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", tmp_path/"venv"], check=True)
    subprocess.run([tmp_path/"venv"/"bin"/"pip", "install", "-q", "-c", ROOT/"constraints.txt", ROOT], check=True)
    run = lambda *a: (
        subprocess.run(
            [tmp_path / "venv" / "bin" / a[0], *a[1:]], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout
    )
    assert "train" in run("rlhf-nb", "--help")
    run("python", "-c", "import rlhf_nb.trainer")
    assert "nbdev" not in run("pip", "freeze")
