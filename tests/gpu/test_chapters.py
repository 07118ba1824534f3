"""The chapters run on the device from top to bottom, and the last one makes what it makes on a T4."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_nb.testing import shipped_rows, tiny_policy

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbdev")
ROOT = Path(__file__).parent.parent.parent
QUICK = ()
CHAPTERS = sorted(path.stem for path in (ROOT/"nbs").glob("*.ipynb") if path.stem[:2] < "10")
RUN = """
import sys
from pathlib import Path
import torch
from nbdev.test import test_nb
assert torch.cuda.is_available()
done, seconds = test_nb(Path(sys.argv[1]), skip_flags=["slow", "gpu"], basepath=sys.argv[2])
sys.exit(not done)
"""


def run(path: Path):
    "As nbdev_test does, in a process of its own."
    env = os.environ | dict(PYTHONWARNINGS="ignore", MPLBACKEND="agg")
    command = [sys.executable, "-c", RUN, path, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in (*CHAPTERS, "10_chat", "10_variations")
])
def test_a_chapter(name):
    run(ROOT/"nbs"/f"{name}.ipynb")


def replaced(source: str, changes: dict[str, str], missing: set[str]) -> str:
    "A cell with other words; what it contains is no longer missing."
    for old, new in changes.items():
        if old in source: missing.discard(old)
        source = source.replace(old, new)
    return source


@pytest.mark.slow
def test_the_colab_notebook(tiny, tmp_path):
    policy, reward = tiny
    rows = shipped_rows()
    prompts = tmp_path/"prompts"
    prompts.mkdir()
    (prompts/"rows.jsonl").write_text("\n".join(json.dumps(rows[i % len(rows)]) for i in range(1016)))
    for part in tiny_policy("qwen3"): part.save_pretrained(tmp_path/"qwen3")
    changes = {
        "bigscience/bloomz-560m": str(policy),
        "OpenAssistant/reward-model-deberta-v3-large-v2": str(reward),
        "BelleGroup/train_0.5M_CN": str(prompts),
        'model_name_or_path="Qwen/Qwen3-0.6B", prompt_template="chat"': f'model_name_or_path="{tmp_path}/qwen3"',
        "max_target_length=256": "max_target_length=16",
        "max_target_length=1024 if on_gpu else 96": "max_target_length=32",
        "max_train_samples=1000": "max_train_samples=40",
        "max_steps=100": "max_steps=2",
        "save_steps=50": "save_steps=1",
        "train_variants = False": "train_variants = True",
        'if on_gpu: variant("8bit", load_in_8bit=True)': "if on_gpu: pass",
    }
    missing = {*changes}
    notebook = nbformat.read(ROOT/"nbs"/"13_colab_t4.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code": cell.source = replaced(cell.source, changes, missing)
    assert not missing
    nbformat.write(notebook, tmp_path/"notebook.ipynb")
    run(tmp_path/"notebook.ipynb")
    for name in ("qwen3", "function", "long", "l4-a100"): assert (tmp_path/f"outputs-{name}").is_dir(), name
    assert (tmp_path/"outputs-rl-v1"/"checkpoint-2").is_dir() and (tmp_path/"merged-rl").is_dir()
