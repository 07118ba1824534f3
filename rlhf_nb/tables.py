"""Tables of data, which are YAML files in `templates/`."""
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

import yaml


def table(name: str) -> Any:
    "Read `templates/NAME.yaml`."
    return yaml.safe_load(files("rlhf_nb").joinpath(f"templates/{name}.yaml").read_text(encoding="utf-8"))


def unknown_settings(names: list[str],     # That the user gave
                     known: Iterable[str], # All settings there are
) -> str:                                  # For an error message
    "Each unknown name, with the one it has here or the nearest."
    old = table("settings")["old_names"]
    def told(name: str) -> str:
        if name in old: return f"{name} is {old[name]} here"
        near = get_close_matches(name, known, n=1)
        return f"{name} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
    return "; ".join(map(told, names))
