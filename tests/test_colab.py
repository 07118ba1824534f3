"The notebooks in Colab: badges and addresses, the original's flags, what only Colab has, and a blank runtime."
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from statistics import mean

import nbformat
import pytest
from colab import ADDRESS, BRANCH, URL, badge, ready_for_colab
from conftest import ROOT
from test_cli import ORIGINAL

RUN = ROOT/"nbs"/"13_colab_t4.ipynb"
read = lambda path: nbformat.read(path, as_version=4)
CELLS = [c.source for c in read(RUN).cells]
cell = lambda text: next(c for c in CELLS if text in c)


@pytest.mark.parametrize("path", sorted((ROOT/"nbs").glob("*.ipynb")), ids=lambda p: p.name)
def test_badge_and_set_up(path):
    nb = read(path)
    assert nb.cells == ready_for_colab(read(path), path.stem).cells, "python tests/colab.py"
    assert f"{URL.removeprefix('https://github.com')}/blob/{BRANCH}/nbs/" in nb.cells[1].source


def test_a_badge_leads_to_its_notebook():
    assert badge("05_ppo").endswith("/nbs/05_ppo.ipynb)") and badge("index").endswith("/nbs/13_colab_t4.ipynb)")


def test_the_project_has_one_address():
    files = subprocess.run(["git", "ls-files", "*.ipynb", "*.md", "*.py", "*.ini"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    found = {m for name in files for m in ADDRESS.findall((ROOT/name).read_text(encoding="utf-8"))}
    assert found == {URL}


def test_the_settings_are_the_originals():
    here = {}
    exec(cell("ORIGINAL = FOLDERS").split("TINY = ")[0], here)
    flags = re.findall(r"--(\w+)(?: (?!--)(\S+))?", ORIGINAL)
    said = {name: value or "True" for name, value in flags if "{" not in value}
    assert len(said) == 16 and {name: str(here["ORIGINAL"][name]) for name in said} == said | dict(learning_rate="1e-05")
    assert {name for name, _ in flags} == {*here["ORIGINAL"]} and (here["ORIGINAL"]["max_steps"], here["ORIGINAL"]["save_steps"]) == (100, 50)


def test_saved_outputs_say_where_they_come_from():
    outputs = [str(o) for c in read(RUN).cells if c.cell_type == "code" for o in c.outputs]
    assert sum("tiny world, CPU" in o for o in outputs) >= 10 and any("not measured on a GPU" in o for o in outputs)
    assert not any("Traceback" in o for o in outputs)


def test_the_table_of_differences_is_what_was_measured():
    runs = json.loads((ROOT/"bench"/"original.json").read_text())
    rows = re.findall(r"^\| [^|]*`([^`|]+)` \| ([\d.]+) \(([\d.]+), ([\d.]+)\) \| ([\d.-]+) \|$", cell("bench/original.py"), re.M)
    true = {name: [r["true"] for r in found] for name, found in runs.items()}
    assert rows == [(name, f"{mean(x):.2f}", f"{min(x):.2f}", f"{max(x):.2f}", f"{mean(r['kl'] for r in runs[name]):.1f}") for name, x in true.items()]


def test_drive_and_download(monkeypatch, tmp_path):
    said, colab = [], types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=lambda at: said.append(("mount", at)))
    colab.files = types.SimpleNamespace(download=lambda file: said.append(("download", Path(file).name)))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    Path("outputs-rl-v1").mkdir()
    monkeypatch.setattr(os, "chdir", lambda to: said.append(("chdir", to)))
    exec(cell("save_to_drive = False").replace("= False", "= True"), dict(os=os))
    exec("import shutil; from pathlib import Path; size = lambda path: 0\n" + cell("download = False").replace("= False", "= True"), {})
    assert said == [("mount", "/content/drive"), ("chdir", "/content/drive/MyDrive"), ("download", "outputs-rl-v1.zip")]


@pytest.mark.slow
def test_peaks_of_the_variants(tmp_path, monkeypatch):
    from rlhf_nb.config import ModelArguments, PPOConfig
    from rlhf_nb.plan import GPUS, plan
    monkeypatch.chdir(tmp_path)
    here = dict(on_gpu=False)
    exec("from transformers import BloomConfig, DebertaV2Config\n" + cell("DebertaV2Config(").removeprefix("#| hide\n"), here)
    peak = lambda more, **of_model: f"{plan(ModelArguments('shapes/policy', 'shapes/reward', lora_rank=8, lora_alpha=16, **of_model), PPOConfig(**dict(batch_size=2, torch_dtype='float16') | more), GPUS['T4']).peak / 1e9:.1f}"
    found = [peak({}), peak({}, load_in_8bit=True), peak(dict(max_target_length=1024)), peak(dict(batch_size=16, mini_batch_size=8))]
    assert re.findall(r"[\d.]+", cell("16 × 256").splitlines()[-1]) == found


@pytest.mark.slow
def test_the_gpu_measurement_runs(tmp_path):
    run = subprocess.run([sys.executable, ROOT/"bench"/"t4.py", tmp_path/"t4.json", "--shape", "tiny", "--steps", "2"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path/"t4.json").read_text())
    assert found["updates"] == 2 and set(found["seconds"]) == {"rollout", "score", "step"} and found["hundred_updates"] > 0


@pytest.mark.slow
def test_a_blank_runtime(tmp_path):
    "A new environment with torch and a kernel, where the project's address is this checkout: Run all, first cells."
    python, torch = tmp_path/"venv"/"bin"/"python", "torch==2.13.0"
    for command in ([sys.executable, "-m", "venv", tmp_path/"venv"], [python, "-m", "pip", "install", "-q", torch, "ipython"]): subprocess.run(command, check=True)
    code = "\n".join(["from IPython.core.interactiveshell import InteractiveShell", "shell = InteractiveShell.instance()",
                      *(f"shell.run_cell({c!r}).raise_error()" for c in CELLS[:12] if c.startswith(("import importlib", "#| hide\nimport gc", "on_gpu")))])
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | dict(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0=f"url.file://{ROOT}.insteadOf", GIT_CONFIG_VALUE_0=URL)
    run = subprocess.run([python, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "tiny world, CPU" in run.stdout, run.stdout + run.stderr
    versions = subprocess.run([python, "-m", "pip", "freeze"], capture_output=True, text=True).stdout
    assert torch in (tmp_path/"keep.txt").read_text() and torch in versions and "rlhf_nb @ git+https://" in versions
