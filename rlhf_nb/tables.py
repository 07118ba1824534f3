"""Tables of data, which are YAML files in `templates/`."""
from importlib.resources import files
from typing import Any

import yaml


def table(name: str) -> Any:
    "Read `templates/NAME.yaml`."
    return yaml.safe_load(files("rlhf_nb").joinpath(f"templates/{name}.yaml").read_text(encoding="utf-8"))
