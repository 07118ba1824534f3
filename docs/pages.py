"""Writes the sources of the site: notebooks, tables, a page per module: python docs/pages.py FOLDER"""
import re
import shutil
import sys
from pathlib import Path

import nbformat
from decoders import decoders_table
from metrics import metrics_table
from nbformat import NotebookNode
from settings import settings_table

DOCS = Path(__file__).parent
ROOT = DOCS.parent
NBS = ROOT/"nbs"
HIDDEN = re.compile(r"#\| hide|#\| eval: false\n!")
API = """# rlhf_nb.{module}

```{{eval-rst}}
.. automodule:: rlhf_nb.{module}
   :members:
```
"""


def read(path: Path) -> NotebookNode:
    "A notebook."
    return nbformat.read(path, as_version=4)


def exported(nb: NotebookNode) -> str: # Empty if there is none
    "The module that a notebook exports."
    found = [re.match(r"#\| default_exp (\w+)", cell.source) for cell in nb.cells]
    return next((match[1] for match in found if match), "")


def book() -> dict[str, str]: # Notebook to its module, or an empty text
    "The chapters, in reading order."
    paths = sorted(NBS.glob("*.ipynb"))
    return {path.stem: exported(read(path)) for path in paths if path.stem != "index"}


def modules() -> list[str]:
    "The chapters' modules, then the plain ones."
    chapters = [module for module in book().values() if module]
    plain = [path.stem for path in sorted((ROOT/"rlhf_nb").glob("*.py")) if not path.stem.startswith("_")]
    return chapters + [module for module in plain if module not in chapters]


def readable(nb: NotebookNode) -> NotebookNode:
    "The same without hidden cells, Colab's set-up and nbdev's directives."
    nb.cells = [c for c in nb.cells if not HIDDEN.match(c.source)]
    for cell in nb.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
        else: cell.source = re.sub(r"\]\(#[^)]+\)", lambda link: link[0].lower(), cell.source) # As Sphinx writes them
    nb.cells = [c for c in nb.cells if c.source.strip()]
    return nb


def contents(caption: str, pages: list[str]) -> str:
    "A part of the navigation."
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def write(folder: Path):
    "The sources, for Sphinx."
    (folder/"api").mkdir(parents=True)
    tables = dict(settings=settings_table(), metrics=metrics_table(), decoders=decoders_table())
    for name in book(): nbformat.write(readable(read(NBS/f"{name}.ipynb")), folder/f"{name}.ipynb")
    index = readable(read(NBS/"index.ipynb"))
    api = [f"api/{module}" for module in modules()]
    parts = contents("The book", list(book())), contents("Reference", ["features", *tables, *api])
    index.cells.append(nbformat.v4.new_markdown_cell("\n\n".join(parts)))
    nbformat.write(index, folder/"index.ipynb")
    for name, text in tables.items(): (folder/f"{name}.md").write_text(text, encoding="utf-8")
    for module in modules():
        (folder/"api"/f"{module}.md").write_text(API.format(module=module), encoding="utf-8")
    shutil.copy(DOCS/"features.md", folder)
    for picture in NBS.glob("*.png"): shutil.copy(picture, folder)


if __name__ == "__main__": write(Path(sys.argv[1]))
