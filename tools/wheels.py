"""Wheels for a machine without network: what the package needs beyond a plain PyTorch image, as constraints.txt has it.

wheels.py FOLDER [--python 3.12]

On that machine: pip install --no-index --no-deps --target SITE FOLDER/*.whl, and SITE on PYTHONPATH."""
import argparse
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MOST = 64 * 2**20 # Bytes, together
THERE = set("""
aiohttp anyio attrs build certifi click filelock fsspec h11 idna jinja2 matplotlib numpy packaging pandas psutil
pygments pyarrow pytest pyyaml regex requests rich setuptools six tensorboard torch tqdm typer typing-extensions
xxhash
""".split()) # With all that they need themselves
TESTS = "nbdev", "nbformat" # With which tests/gpu runs the chapters
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]


def needs(name: str, python: str) -> list[Requirement]: # As "3.12"
    "What an installed package requires there, without its extras."
    found = map(Requirement, requires(name) or [])
    there = dict(python_version=python, python_full_version=f"{python}.0", sys_platform="linux",
                 platform_system="Linux", platform_machine="x86_64", extra="")
    return [each for each in found if not each.marker or each.marker.evaluate(there)]


def missing(python: str) -> dict[str, str]: # Name and version
    "What the image lacks, in the versions of this environment, with all that it requires in turn."
    settings = ConfigParser(delimiters=["="])
    settings.read(Path(__file__).parents[1]/"settings.ini", encoding="utf-8")
    wanted = [Requirement(word) for word in [*settings["DEFAULT"]["requirements"].split(), *TESTS]]
    found: dict[str, str] = {}
    while wanted:
        name = canonicalize_name(wanted.pop().name)
        if name in THERE or name in found: continue
        found[name] = version(name)
        wanted += needs(name, python)
    return found


def download(packages: dict[str, str], folder: Path, python: str):
    "Fetch one wheel of each; older ones in the folder are deleted."
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.whl"): old.unlink()
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [
            sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:",
            "--python-version", python, "--implementation", "cp", *platforms, "-d", folder,
            *(f"{name}=={number}" for name, number in packages.items()),
        ],
        check=True,
    )
    got = {canonicalize_name(re.match(r"[^-]+", path.name)[0]) for path in folder.glob("*.whl")}
    if lost := packages.keys() - got: sys.exit(f"No wheel of {', '.join(sorted(lost))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12")
    args = parser.parse_args()
    packages = missing(args.python)
    download(packages, args.folder, args.python)
    sizes = {path.name: path.stat().st_size for path in sorted(args.folder.glob("*.whl"))}
    for name, size in sizes.items(): print(f"{size / 2**20:6.2f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total / 2**20:6.2f} MiB  together")
    if total > MOST: sys.exit(f"More than {MOST // 2**20} MiB")
