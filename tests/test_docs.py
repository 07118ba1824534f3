"The site: every notebook and module is in it, its links lead somewhere, and it shows what a reader wants."
import importlib
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/"docs"))
from pages import HIDDEN, book, modules, readable  # noqa: E402

NBS = ROOT/"nbs"
NOTEBOOKS = sorted(NBS.glob("*.ipynb"))
MODULES = [f"rlhf_nb.{module}" for module in modules()]
PAGES = [*NOTEBOOKS, ROOT/"README.md", ROOT/"docs"/"features.md"]


def read(path): return nbformat.read(path, as_version=4)


def links(path: Path) -> list[str]:
    "Paths that a page links to."
    if path.suffix == ".ipynb": text = "\n".join(c.source for c in read(path).cells if c.cell_type == "markdown")
    else: text = path.read_text(encoding="utf-8")
    found = re.findall(r"\]\(([^)\s]+)", text)
    return [link.split("#")[0] for link in found if not link.startswith(("http", "mailto:", "#"))]


def test_every_notebook_and_module_is_in_the_navigation():
    assert {"index", *book()} == {path.stem for path in NOTEBOOKS}
    files = {path.stem for path in (ROOT/"rlhf_nb").glob("*.py")}
    assert {name.split(".")[1] for name in MODULES} == {name for name in files if not name.startswith("_")}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(path):
    on_site = path.parent.name == "docs" # Which has all pages in one folder
    made = {"settings.md", "metrics.md", "decoders.md"} if on_site else set()
    folder = NBS if on_site else path.parent
    assert [link for link in links(path) if link not in made and not (folder/link).is_file()] == []


def test_features_name_settings_and_commands():
    from rlhf_nb.cli import COMMANDS, train_parser
    from rlhf_nb.trainer import PPOTrainer
    known = {action.dest for action in train_parser()._actions} | {*inspect.signature(PPOTrainer).parameters}
    known |= {"accelerate launch", "torchrun", "--accelerate_config", *[f"rlhf-nb {name}" for name in COMMANDS]}
    named = re.findall(r"`([^`]+)`", (ROOT/"docs"/"features.md").read_text(encoding="utf-8"))
    assert [name for name in named if name not in known] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_what_is_shown(path):
    cells, shown = read(path).cells, readable(read(path)).cells
    assert not any(re.search(r"^#\|", c.source, re.M) or not c.source.strip() for c in shown)
    kept = {c.id: c for c in shown}
    for c in cells:
        if HIDDEN.match(c.source): assert c.id not in kept
        elif re.sub(r"#\|.*", "", c.source).strip():
            same_case = str if c.cell_type == "code" else str.lower # Links to headings are in lower case
            assert same_case(c.source).endswith(same_case(kept[c.id].source))
            assert c.get("outputs") == kept[c.id].get("outputs")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    for name in ("sphinx", "myst_nb", "furo", "jieba"): pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("site")
    sphinx = ["-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", folder/"in", folder/"out"]
    for command in (["docs/pages.py", folder/"in"], sphinx):
        run = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
    return folder/"out"


@pytest.mark.slow
def test_site_has_every_page(site):
    pages = ["features", "settings", "metrics", "decoders", *[path.stem for path in NOTEBOOKS]]
    pages += [f"api/{name.split('.')[1]}" for name in MODULES]
    for page in pages: assert not re.search(r"#\| |\x1b\[", (site/f"{page}.html").read_text(encoding="utf-8")), page


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_site_has_every_symbol(site, name):
    module = importlib.import_module(name)
    page = (site/"api"/f"{name.split('.')[1]}.html").read_text(encoding="utf-8")
    own = [s for s, o in vars(module).items() if getattr(o, "__module__", None) == name and not s.startswith("_")]
    named = getattr(module, "__all__", [s for s in own if getattr(module, s).__doc__])
    symbols = [s for s in named if inspect.isclass(o := getattr(module, s)) or inspect.isfunction(o)]
    assert symbols and [s for s in symbols if f'id="{name}.{s}"' not in page] == []


@pytest.mark.slow
def test_site_shows_comments_on_parameters(site):
    def text(page): return re.sub(r"<[^>]+>", "", (site/"api"/page).read_text(encoding="utf-8"))
    assert "lam – 0: one-step errors; 1: reward to go" in text("ppo.html"), "a function's"
    assert "logprobs – Of the sampled tokens, (B, T), float32" in text("models.html"), "a named tuple's"
    limited = "num_generations – Completions per prompt; must be at least 1"
    assert limited in text("config.html"), "a setting's, with its limit"


@pytest.mark.slow
def test_site_can_be_searched(site):
    text = (site/"searchindex.js").read_text(encoding="utf-8")
    index = json.loads(re.fullmatch(r"Search\.setIndex\((.*)\)", text, re.S)[1])
    def found(word):
        places = [index[kind].get(word, []) for kind in ("terms", "titleterms")]
        numbers = [i for some in places for i in (some if isinstance(some, list) else [some])]
        return {index["docnames"][i] for i in numbers}
    assert "05_ppo" in found("advantag") and "09_clinic" in found("晕车")
    assert "Stemmer = EnglishStemmer" in (site/"_static"/"language_data.js").read_text(encoding="utf-8")
