"""Builds the package from settings.ini, the one source of name, version and requirements."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def words(key): return cfg[key].split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8")
    if Path("README.md").exists()
    else cfg["description"],
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    python_requires=f">={cfg['min_python']}",
    install_requires=words("requirements"),
    extras_require={name: words(f"{name}_requirements") for name in ("dev", "bnb", "deepspeed")},
    packages=["rlhf_nb", "rlhf_nb.accelerate_configs", "rlhf_nb.templates", "rlhf_nb.data"],
    package_dir={"rlhf_nb": "rlhf_nb", "rlhf_nb.data": "data"},
    package_data={
        "rlhf_nb.accelerate_configs": ["*.yaml"],
        "rlhf_nb.templates": ["*"],
        "rlhf_nb.data": ["**/*.jsonl", "**/*.json", "**/*.safetensors"],
    },
    entry_points=dict(console_scripts=words("console_scripts")),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        *[f"Programming Language :: Python :: {v}" for v in ("3", "3.11", "3.12", "3.13")],
    ],
    zip_safe=False,
)
