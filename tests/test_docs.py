"The site: every notebook is in it, its links lead somewhere, and it shows what a reader wants."
import importlib
import inspect
import json
import re
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/"docs"))
from pages import book, readable

NBS = ROOT/"nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
MODULES = [f"rlhf_nb.{m}" for m in book().values() if m]
read = lambda path: nbformat.read(path, as_version=4)


def test_every_notebook_and_module_is_in_the_navigation():
    assert {"index", *book()} == {p.stem for p in NOTEBOOKS}
    assert {m.split(".")[1] for m in MODULES} == {p.stem for p in (ROOT/"rlhf_nb").glob("*.py")} - {"__init__", "_modidx"}


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT/"README.md"], ids=lambda p: p.name)
def test_links_lead_to_files(path):
    text = path.read_text(encoding="utf-8") if path.suffix == ".md" else "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    links = [l.split("#")[0] for l in re.findall(r"\]\(([^)\s]+)", text) if not l.startswith(("http", "mailto:", "#"))]
    assert [l for l in links if not (path.parent/l).is_file()] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_what_is_shown(path):
    cells, shown = read(path).cells, readable(read(path)).cells
    assert not any(re.search(r"^#\|", c.source, re.M) or not c.source.strip() for c in shown)
    kept = {c.id: c for c in shown}
    for c in cells:
        if c.source.startswith("#| hide"): assert c.id not in kept
        elif re.sub(r"#\|.*", "", c.source).strip(): assert c.source.endswith(kept[c.id].source) and c.get("outputs") == kept[c.id].get("outputs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("sphinx", "myst_nb", "furo", "jieba"): pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    for command in (["docs/pages.py", folder/"in"], ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", folder/"in", folder/"out"]):
        run = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    return folder/"out"


@pytest.mark.slow
def test_site_has_every_page(site):
    pages = [p.stem for p in NOTEBOOKS] + [f"api/{m.split('.')[1]}" for m in MODULES]
    for page in pages: assert not re.search(r"#\| |\x1b\[", (site/f"{page}.html").read_text(encoding="utf-8")), page


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_site_has_every_symbol(site, name):
    module, page = importlib.import_module(name), (site/"api"/f"{name.split('.')[1]}.html").read_text(encoding="utf-8")
    symbols = [s for s in module.__all__ if inspect.isclass(o := getattr(module, s)) or inspect.isfunction(o)]
    assert symbols and [s for s in symbols if f'id="{name}.{s}"' not in page] == []


@pytest.mark.slow
def test_site_shows_comments_on_parameters(site):
    text = lambda page: re.sub(r"<[^>]+>", "", (site/"api"/page).read_text(encoding="utf-8"))
    assert "lam – 0: one-step errors; 1: reward to go" in text("ppo.html")                # A function's
    assert "logprobs – Of the drawn tokens, (B, T), float32" in text("models.html")       # A named tuple's
    assert "batch_size – Prompts per PPO update; must be at least 1" in text("config.html")  # A setting's, with its limit


@pytest.mark.slow
def test_site_can_be_searched(site):
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", (site/"searchindex.js").read_text(encoding="utf-8"), re.S)[1])
    found = lambda word: {index["docnames"][i] for i in index["terms"][word]}
    assert "05_ppo" in found("advantag") and "09_tiny" in found("晕车")
    assert "Stemmer = EnglishStemmer" in (site/"_static"/"language_data.js").read_text(encoding="utf-8")
