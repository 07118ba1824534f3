"Notebooks, package and README say the same."
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

sys.path.insert(0, str(ROOT/"tools"))
from options import OUT, options
from readme import render

BIN = Path(sys.executable).parent


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for sub in ("nbs", "rlhf_nb")
        for p in sorted((folder / sub).rglob("*"))
        if p.is_file() and p.suffix in (".ipynb", ".py") and ".ipynb_checkpoints" not in p.parts
    }


def test_export_and_clean_change_nothing(tmp_path):
    for name in ("nbs", "rlhf_nb"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"settings.ini", tmp_path)
    before = files(tmp_path)
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([BIN / command], cwd=tmp_path, check=True, capture_output=True)
    after = files(tmp_path)
    changed = [name for name in {*before, *after} if before.get(name) != after.get(name)]
    assert not changed, f"run nbdev_export and nbdev_clean: {changed}"


def test_the_program_knows_every_setting():
    assert OUT.read_text(encoding="utf-8") == options(), "run python tools/options.py"


def test_readme_is_the_index_notebook():
    assert (ROOT/"README.md").read_text(encoding="utf-8") == render(), "run make readme"


def test_no_path_of_a_machine():
    tracked = subprocess.run(
        [
            "git",
            "ls-files",
            "nbs",
            "rlhf_nb",
            "tests",
            "tools",
            "bench",
            "examples",
            "data",
            "README.md",
            "README_zh.md",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    paths = re.compile(r"site-packages|/(?:home|root|Users)/|" + re.escape(str(ROOT)))
    text = [
        f
        for f in tracked
        if Path(f).suffix not in (".safetensors", ".png") and f not in ("tools/notebooks.py", "tests/test_in_step.py")
    ]
    assert not [f for f in text if paths.search((ROOT/f).read_text(encoding="utf-8"))]


def test_notebooks_are_light():
    heavy = {p.name: p.stat().st_size // 1024 for p in (ROOT/"nbs").glob("*.ipynb") if p.stat().st_size > 150 * 1024}
    assert not heavy
