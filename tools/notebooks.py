"""Runs notebooks in place and keeps their outputs, without noise: python tools/notebooks.py [NAME ...]"""
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOISE = re.compile(r"site-packages|it/s\]|ba/s\]|examples/s\]|update/s|\[transformers\]|/tmp/|^\s*$")


def is_noise(output) -> bool:
    "Other libraries' remarks, and windows onto servers that have ended."
    if output.output_type == "stream": return output.name == "stderr" and bool(NOISE.search(output.text))
    return "tensorboard-frame" in output.get("data", {}).get("text/html", "")


def run(path: Path):
    "Execute one notebook from its own folder and save it."
    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        if cell.source.startswith("#| eval: false"): cell.metadata.tags = ["skip"] # nbdev_clean takes the tag away
    where = dict(metadata=dict(path=str(path.parent)))
    NotebookClient(nb, timeout=900, kernel_name="python3", skip_cells_with_tag="skip", resources=where).execute()
    for cell in nb.cells:
        if cell.cell_type == "code": cell.outputs = [o for o in cell.outputs if not is_noise(o)]
    nbformat.write(nb, path)


if __name__ == "__main__":
    os.environ.update(PYTHONWARNINGS="ignore", HF_HUB_OFFLINE="1")
    for path in sorted((ROOT/"nbs").glob("*.ipynb")):
        if path.stem != "index" and (not sys.argv[1:] or path.stem in sys.argv[1:]):
            run(path)
            print(path.name, path.stat().st_size // 1024, "KB")
    subprocess.run([Path(sys.executable).parent/"nbdev_clean"], cwd=ROOT, check=True)
