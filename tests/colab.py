"""Gives every notebook its badge "Open in Colab" and what it needs there, from git_url and branch in settings.ini: python tests/colab.py"""
import re
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import urlparse

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell

ROOT = Path(__file__).parent.parent
parser = ConfigParser(delimiters=["="])
parser.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = parser["DEFAULT"]
URL, BRANCH = SETTINGS["git_url"], SETTINGS["branch"]
PICTURE = "https://colab.research.google.com/assets/colab-badge.svg"
ADDRESS = re.compile(rf"https://github\.com/[\w.-]+/{SETTINGS['repo']}(?![\w-])")
SET_UP = f"""#| hide
import importlib.util
import os

if importlib.util.find_spec("rlhf_nb") is None:
    !git clone -q --depth 1 --branch {BRANCH} {URL}
    %pip install -q "./{SETTINGS['repo']}[dev]"
if os.path.isdir("{SETTINGS['repo']}/nbs"): os.chdir("{SETTINGS['repo']}/nbs")"""


def badge(name: str) -> str:
    "Leads to the notebook; the index leads to the run."
    page = "13_colab_t4" if name == "index" else name
    return f"[![Open in Colab]({PICTURE})](https://colab.research.google.com/github{urlparse(URL).path}/blob/{BRANCH}/nbs/{page}.ipynb)"


def ready_for_colab(nb: NotebookNode, name: str) -> NotebookNode:
    "The same with badge and set-up behind the title; the Colab run has a set-up of its own, and where there is no code, none is needed."
    ours = lambda c: PICTURE in c.source or c.source.startswith("#| hide") and "git clone" in c.source
    title, *rest = [c for c in nb.cells if not ours(c)]
    needed = any(c.cell_type == "code" for c in rest) and name not in ("index", "13_colab_t4")
    added = [new_markdown_cell(badge(name), id="badge")] + [new_code_cell(SET_UP, id="setup")] * needed
    nb.cells = [title, *added, *rest]
    for cell in nb.cells: cell.source = ADDRESS.sub(URL, cell.source)
    return nb


if __name__ == "__main__":
    for path in sorted((ROOT/"nbs").glob("*.ipynb")): nbformat.write(ready_for_colab(nbformat.read(path, as_version=4), path.stem), path)
    path = ROOT/"README_zh.md"
    path.write_text(ADDRESS.sub(URL, path.read_text(encoding="utf-8")), encoding="utf-8")
