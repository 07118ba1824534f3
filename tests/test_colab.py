"The notebooks in Colab: badges and addresses, the original's flags, what only Colab has, and a blank runtime."
import json
import os
import re
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import ROOT
from jupyter_client import KernelManager
from nbclient import NotebookClient
from test_cli import ORIGINAL
from test_docs import NOTEBOOKS, read

sys.path.insert(0, str(ROOT/"tools"))
from badges import ADDRESS, BRANCH, FOR_OTHERS, FOR_RUN, URL, WITH_CHECKOUT, badge, ready_for_colab  # noqa: E402
from badges import RUN as NAME  # noqa: E402

RUN = ROOT/"nbs"/f"{NAME}.ipynb"
CELLS = [c.source for c in read(RUN).cells]


def cell(text): return next(c for c in CELLS if text in c)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_badge_and_set_up(path):
    nb = read(path)
    assert nb == ready_for_colab(read(path), path.stem), "make badges"
    assert f"{URL.removeprefix('https://github.com')}/blob/{BRANCH}/nbs/" in nb.cells[1].source


def test_a_badge_leads_to_its_notebook():
    assert badge("05_ppo").endswith("/nbs/05_ppo.ipynb)") and badge("index").endswith("/nbs/13_colab_t4.ipynb)")


def test_the_project_has_one_address():
    command = ["git", "ls-files", "*.ipynb", "*.md", "*.py", "*.ini"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split()
    texts = [(ROOT/name).read_text(encoding="utf-8") for name in files if (ROOT/name).exists()]
    found = {m[0].removeprefix(m[1]) for text in texts for m in ADDRESS.finditer(text)}
    assert found == {URL.removeprefix("https://github.com")}


def test_the_settings_are_the_originals():
    here = {}
    exec(cell("ORIGINAL = FOLDERS").split("TINY = ")[0], here)
    flags = re.findall(r"--(\w+)(?:\s+(?!--)(\S+))?", ORIGINAL)
    said = {name: value or "True" for name, value in flags if "{" not in value}
    given = {name: str(here["ORIGINAL"][name]) for name in said}
    assert len(said) == 16 and given == said | dict(learning_rate="1e-05")
    assert {name for name, _ in flags} == {*here["ORIGINAL"]}
    assert (here["ORIGINAL"]["max_steps"], here["ORIGINAL"]["save_steps"]) == (100, 50)


def test_saved_outputs_say_where_they_come_from():
    outputs = [str(o) for c in read(RUN).cells if c.cell_type == "code" for o in c.outputs]
    assert sum("tiny world, CPU" in o for o in outputs) >= 10 and any("not measured on a GPU" in o for o in outputs)
    assert not any("Traceback" in o for o in outputs)


def test_the_table_of_differences_is_what_was_measured():
    runs = json.loads((ROOT/"bench"/"original.json").read_text())
    rows = re.findall(r"^\| [^|]*`([^`|]+)` \| ([^|]+) \| ([^|]+) \|$", cell("bench/original.py"), re.M)
    def told(found, key, n):
        x = [r[key] for r in found]
        return f"{mean(x):.{n}f} ({min(x):.{n}f}, {max(x):.{n}f})"
    assert rows == [(name, told(found, "true", 2), told(found, "kl", 1)) for name, found in runs.items()]


def test_drive_and_download(monkeypatch, tmp_path):
    said, colab = [], types.ModuleType("google.colab")
    colab.drive = types.SimpleNamespace(mount=lambda at: said.append(("mount", at)))
    colab.files = types.SimpleNamespace(download=lambda file: said.append(("download", Path(file).name)))
    monkeypatch.setitem(sys.modules, "google.colab", colab)
    monkeypatch.chdir(tmp_path)
    Path("outputs-rl-v1").mkdir()
    monkeypatch.setattr(os, "chdir", lambda to: said.append(("chdir", to)))
    ticked = cell("save_to_drive = False").replace("= False", "= True")
    for on_gpu in (False, True): exec(ticked, dict(os=os, on_gpu=on_gpu))
    ticked = cell("download = False").replace("= False", "= True")
    exec(ticked, dict(shutil=shutil, Path=Path, size=lambda path: 0, out="outputs-rl-v1"))
    assert said == [("mount", "/content/drive"), ("chdir", "/content/drive/MyDrive"), ("download", "outputs-rl-v1.zip")]


@pytest.mark.slow
def test_peaks_of_the_variants(tmp_path, monkeypatch):
    from rlhf_nb.cli import as_flags, train_parser
    from rlhf_nb.memory import GPUS, plan
    monkeypatch.chdir(tmp_path)
    configs = cell("DebertaV2Config(").removeprefix("#| hide\n")
    exec("from transformers import BloomConfig, DebertaV2Config\n" + configs, dict(on_gpu=False))
    here = {}
    exec(cell("ORIGINAL = FOLDERS").split("TINY = ")[0], here)
    shapes = dict(model_name_or_path="shapes/policy", reward_model_name_or_path="shapes/reward")

    def peak(**changes):
        flags = as_flags(here["ORIGINAL"] | shapes | changes)
        model_args, _, args, *_ = train_parser().read(flags)
        return f"{plan(model_args, args, GPUS['T4']).peak / 1e9:.1f}"
    found = [peak(), peak(load_in_8bit=True), peak(max_target_length=1024), peak(batch_size=16, mini_batch_size=8)]
    assert re.findall(r"[\d.]+", cell("16 × 256").splitlines()[-1]) == found


@pytest.mark.slow
def test_the_gpu_measurement_runs(tmp_path):
    command = [sys.executable, ROOT/"bench"/"t4.py", tmp_path/"t4.json", "--shape", "tiny", "--steps", "2"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    found = json.loads((tmp_path/"t4.json").read_text())
    assert found["updates"] == 2 and found["hundred_updates"] > 0
    assert set(found["seconds"]) == {"rollout", "score", "step"}


def test_run_all_goes_on_where_there_is_a_whole_checkpoint(monkeypatch, tmp_path):
    from rlhf_nb.checkpoint import find_checkpoint, write_checkpoint
    from rlhf_nb.cli import DEMO, NAMES
    monkeypatch.chdir(tmp_path)
    def resumes(start_afresh=False):
        here = dict(on_gpu=False, DEMO=DEMO, NAMES=NAMES, find_checkpoint=find_checkpoint)
        exec(cell("ORIGINAL = FOLDERS").replace("start_afresh = False", f"start_afresh = {start_afresh}"), here)
        assert here["settings"]["overwrite_output_dir"] != here["settings"]["resume_from_checkpoint"]
        return here["settings"]["resume_from_checkpoint"]
    assert not resumes()
    Path("outputs-rl-v1/checkpoint-50").mkdir(parents=True)
    assert not resumes(), "cut short by a disconnect"
    write_checkpoint("outputs-rl-v1/checkpoint-50", {}, lambda path: None)
    assert resumes() and not resumes(start_afresh=True)
    Path("outputs-rl-v1/checkpoint-50").rename("outputs-rl-v1/tmp-checkpoint-50")
    assert resumes(), "whole, but for its name"


STAND_IN = """from types import SimpleNamespace
from datasets import Dataset
from rlhf_nb.testing import save_tiny, shipped_rows
save_tiny(".")
torch.cuda.get_device_name = lambda: "stand-in"
torch.cuda.get_device_properties = lambda i: SimpleNamespace(total_memory=16e9)
torch.cuda.memory_reserved = torch.cuda.max_memory_reserved = torch.cuda.reset_peak_memory_stats = lambda: 10**9
def load_dataset(name, split):
    rows = [row | dict(instruction=f"{row['instruction']} {i}") for row in shipped_rows() for i in range(20)]
    return Dataset.from_list(rows)
"""
SMALL = {
    "on_gpu = torch.cuda.is_available()": STAND_IN + "on_gpu = True",
    "bigscience/bloomz-560m": "policy",
    "OpenAssistant/reward-model-deberta-v3-large-v2": "reward",
    '"float16"': '"float32"',
    "max_steps=100": "max_steps=2",
    "save_steps=50": "save_steps=1",
    "max_steps=40": "max_steps=2",
    "save_steps=20": "save_steps=1",
    "max_target_length=256": "max_target_length=8",
    "Qwen/Qwen3-0.6B": "policy",
    'prompt_template="chat"': 'prompt_template="alpaca"',
    "1024 if on_gpu": "16 if on_gpu",
    'variant("8bit", load_in_8bit=True)': "None",
}


@pytest.mark.slow
@pytest.mark.parametrize("ticked", [False, True])
def test_what_a_gpu_would_run(ticked, tmp_path):
    "The cells as they are on a GPU, with small models, and stand-ins for the hub's data and the GPU's figures."
    nb = read(RUN)
    for old, new in (SMALL | {"train_variants = False": f"train_variants = {ticked}"}).items():
        assert any(old in c.source for c in nb.cells)
        for c in nb.cells: c.source = c.source.replace(old, new)
    NotebookClient(nb, timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path)))).execute()
    said = "".join(str(c.outputs) for c in nb.cells if c.cell_type == "code")
    assert "not measured on a GPU" not in said and "tiny world" not in said
    assert "997 prompts" in said and "Memory on" in said
    assert all((tmp_path/name).is_dir() for name in ("outputs-rl-v1", "merged-rl"))
    assert all((tmp_path/f"outputs-{name}").is_dir() == ticked for name in ("function", "qwen3", "long", "l4-a100"))


TORCH = f"torch=={torch.__version__.split('+')[0]}"
COLAB = ["ipykernel", "pandas==2.2.2", "numpy==2.0.2", "pyarrow==18.1.0", "torchao==0.10.0", TORCH]
# What Colab's kernel has done before the first cell
BEGIN = "import logging, pandas; logging.getLogger().addHandler(logging.StreamHandler())"


@pytest.fixture(scope="module")
def blank(tmp_path_factory):
    """Three functions of an environment like Colab's, where the project's address is this checkout.

    The first runs cells in a new kernel, and gives what they print and whether the kernel lives."""
    folder = tmp_path_factory.mktemp("blank")
    python = folder/"venv"/"bin"/"python"
    pip = [python, "-m", "pip"]
    for command in ([sys.executable, "-m", "venv", folder/"venv"], [*pip, "install", "-q", *COLAB]):
        subprocess.run(command, check=True)
    checkout = dict(GIT_CONFIG_COUNT="1", GIT_CONFIG_KEY_0=f"url.file://{ROOT}.insteadOf", GIT_CONFIG_VALUE_0=URL)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | checkout
    env |= dict(PATH=f"{python.parent}:{os.environ['PATH']}")

    def run(*cells):
        manager = KernelManager()
        manager.kernel_spec.argv[0] = str(python)
        manager.start_kernel(env=env, cwd=folder)
        client = manager.blocking_client()
        said = []
        def note(message): said.append(str(message["content"]))
        client.start_channels()
        try:
            client.wait_for_ready(60)
            for source in (BEGIN, *cells):
                reply = client.execute_interactive(source, timeout=600, output_hook=note)
                assert reply["content"]["status"] == "ok", "".join(said)
            end = time.monotonic() + 5
            while manager.is_alive() and time.monotonic() < end: time.sleep(.2)
            return "".join(said), manager.is_alive()
        finally:
            client.stop_channels()
            if manager.is_alive(): manager.shutdown_kernel(now=True)

    def freeze(): return subprocess.run([*pip, "freeze"], capture_output=True, text=True).stdout

    def uninstall(): subprocess.run([*pip, "uninstall", "-q", "-y", "rlhf_nb"], check=True)
    return run, freeze, uninstall


@pytest.mark.slow
def test_a_blank_runtime_restarts_once_and_trains(blank):
    run, freeze, _ = blank
    said, lives = run(FOR_RUN)
    assert "press Run all again" in said and not lives
    installed = freeze()
    assert all(text in installed for text in (TORCH, COLAB[1], "rlhf_nb @ git+https://")) and "torchao" not in installed
    until = next(i for i, c in enumerate(CELLS) if "trainer = make_trainer(" in c)
    cells = read(RUN).cells[:until + 1]
    code = [c.source for c in cells if c.cell_type == "code" and "plan(" not in c.source]
    said, lives = run(*code, "trainer.args.max_steps = trainer.state.max_steps = 1; trainer.train()")
    assert lives and "tiny world, CPU" in said and "update 1/1" in said
    assert "{'name': 'stdout', 'text': 'data/finetune: 480 prompts" in said


@pytest.mark.slow
def test_a_blank_runtime_for_the_other_notebooks(blank):
    run, _, uninstall = blank
    uninstall()
    run(WITH_CHECKOUT)
    look = "import os, rlhf_nb.trainer; print(sorted(os.listdir('../bench'))[0], os.path.basename(os.getcwd()))"
    said, lives = run(WITH_CHECKOUT, look)
    assert lives and "learning.py nbs" in said


def test_chapters_have_a_set_up_of_one_line():
    assert FOR_OTHERS == "#| eval: false\n!pip install -q rlhf_nb"
