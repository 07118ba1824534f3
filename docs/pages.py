"""Writes the sources of the site: the notebooks as a reader wants them, and a page per module: python docs/pages.py FOLDER"""
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

ROOT = Path(__file__).parent.parent
NBS = ROOT/"nbs"
API = """# rlhf_nb.{module}

```{{eval-rst}}
.. automodule:: rlhf_nb.{module}
   :members:
```
"""


def book() -> dict[str, str]: # Notebook to its module, "" if it has none
    "The chapters, in the order of the table in the index."
    text = "\n".join(c.source for c in nbformat.read(NBS/"index.ipynb", as_version=4).cells)
    return dict(re.findall(r"^\| \[\w+\]\((\w+)\.ipynb\) \| (?:`(\w+)`)?", text, re.M))


def readable(nb: NotebookNode) -> NotebookNode:
    "The same without hidden cells and without nbdev's directives."
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    for cell in nb.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    nb.cells = [c for c in nb.cells if c.source.strip()]
    return nb


def contents(caption: str, pages: list[str]) -> str:
    "A part of the navigation."
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def write(folder: Path):
    "The sources, for Sphinx."
    (folder/"api").mkdir(parents=True)
    chapters = book()
    modules = [m for m in chapters.values() if m]
    for name in ["index", *chapters]:
        nb = readable(nbformat.read(NBS/f"{name}.ipynb", as_version=4))
        if name == "index":
            parts = contents("The book", list(chapters)), contents("API", [f"api/{m}" for m in modules])
            nb.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(parts)))
        nbformat.write(nb, folder/f"{name}.ipynb")
    for picture in NBS.glob("*.png"): shutil.copy(picture, folder)
    for module in modules: (folder/"api"/f"{module}.md").write_text(API.format(module=module), encoding="utf-8")


if __name__ == "__main__": write(Path(sys.argv[1]))
