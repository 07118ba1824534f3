"""Gives every notebook its badge "Open in Colab" and its set-up, from settings.ini: python tools/badges.py"""
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
URL, BRANCH, REPO = SETTINGS["git_url"], SETTINGS["branch"], SETTINGS["repo"]
PICTURE = "https://colab.research.google.com/assets/colab-badge.svg"
ADDRESS = re.compile(rf"(https://(?:colab\.research\.google\.com/)?github(?:\.com)?)/[\w.-]+/{REPO}(?![\w-])")
RUN = "13_colab_t4"
INSTALL = """import importlib.metadata
import importlib.util
import sys

found = importlib.util.find_spec("rlhf_nb")
if found is None or found.origin is None:
    keep = "torch", "torchvision", "torchaudio", "numpy", "pandas"
    with open("keep.txt", "w") as file:
        for d in importlib.metadata.distributions():
            if d.name in keep: print(f"{d.name}=={d.version}", file=file)
    %pip install -q -c keep.txt "TARGET"
    %pip uninstall -q -y torchao
    if "pyarrow" in sys.modules and sys.modules["pyarrow"].__version__ != importlib.metadata.version("pyarrow"):
        print("运行时重启，请再点一次“全部运行” · The runtime restarts: press Run all again")
        get_ipython().kernel.do_shutdown(True)"""
FOR_RUN = INSTALL.replace("TARGET", f"{REPO}[bnb] @ git+{URL}")
FOR_OTHERS = f"#| eval: false\n!pip install -q {REPO}"
WITH_CHECKOUT = f"""#| eval: false
!git clone -q --depth 1 --branch {BRANCH} {URL} && pip install -q ./{REPO}
%cd {REPO}/nbs"""


def badge(name: str) -> str:
    "Leads to the notebook; the index leads to the run."
    at = f"{urlparse(URL).path}/blob/{BRANCH}/nbs/{RUN if name == 'index' else name}.ipynb"
    return f"[![Open in Colab]({PICTURE})](https://colab.research.google.com/github{at})"


def addressed(text: str) -> str:
    "With the project's address of today."
    return ADDRESS.sub(rf"\1{urlparse(URL).path}", text)


def ready_for_colab(nb: NotebookNode, name: str) -> NotebookNode:
    "The same with badge and set-up after the title; the run asks for a T4, and without code no set-up is needed."
    def is_set_up(c): return "pip install -q" in c.source
    title, *rest = [c for c in nb.cells if PICTURE not in c.source and (name == RUN or not is_set_up(c))]
    added = [new_markdown_cell(badge(name), id="badge")]
    if any(c.cell_type == "code" for c in rest) and name not in ("index", RUN):
        reads_checkout = any("../bench" in c.source for c in rest)
        added.append(new_code_cell(WITH_CHECKOUT if reads_checkout else FOR_OTHERS, id="setup"))
    nb.cells = [title, *added, *rest]
    for cell in nb.cells: cell.source = addressed(cell.source)
    if name == RUN:
        next(filter(is_set_up, nb.cells)).source = FOR_RUN
        nb.metadata |= dict(accelerator="GPU", colab=dict(gpuType="T4"))
    return nb


if __name__ == "__main__":
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        nbformat.write(ready_for_colab(nbformat.read(path, as_version=4), path.stem), path)
    path = ROOT/"README_zh.md"
    path.write_text(addressed(path.read_text(encoding="utf-8")), encoding="utf-8")
