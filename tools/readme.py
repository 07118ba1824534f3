"""Writes README.md from nbs/index.ipynb, without the cells that are hidden there."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent


def render() -> str:
    "The README's text."
    nb = nbformat.read(ROOT/"nbs"/"index.ipynb", as_version=4)
    nb.metadata["language_info"] = dict(name="python")
    nb.cells = [c for c in nb.cells if not c.source.startswith("#| hide")]
    for cell in nb.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n", "", cell.source, flags=re.M)
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\(([\w.]+\.(?:ipynb|png))\)", r"](nbs/\1)", text)
    return "<!-- Made from nbs/index.ipynb by `make readme`; edit the notebook. -->\n\n" + text.strip() + "\n"


if __name__ == "__main__": (ROOT/"README.md").write_text(render(), encoding="utf-8")
