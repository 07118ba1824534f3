"""Write rlhf_nb/templates/options.json: what the program says of its commands and settings without loading torch."""
import argparse
import json
from dataclasses import MISSING, Field, fields
from importlib.metadata import version
from pathlib import Path

from rlhf_nb.cli import CLINIC, COMMANDS, NAMES, Parser
from rlhf_nb.config import REFUSED, PPOConfig
from rlhf_nb.program import completion

OUT = Path(__file__).parents[1]/"rlhf_nb"/"templates"/"options.json"
BOOL = "True|False"
ORIGINAL = "Names of the original program, and what they are here"
TRAINING = "Settings of transformers' TrainingArguments"


def takes(action: argparse.Action) -> str: # Of a setting
    "The kind of its value, for the help."
    choices = "|".join(map(str, action.choices or ()))
    if 0 < len(choices) < 30: return choices  # The error for a wrong one lists any number
    name = {"string_to_bool": BOOL, "int": "N", "float": "X"}.get(action.type.__name__, "TEXT")
    return f"{name} ..." if action.nargs == "+" else name


def does(f: Field, defaults: dict) -> str | None: # None: refused, so not shown
    "What a setting does, and its default."
    if f.name in REFUSED: return None
    text = f.metadata.get("help", "").split(". ")[0].strip(" .")
    default = defaults.get(f.name, f.default)
    if isinstance(default, str): default = default.removeprefix(f"{CLINIC.parent}/")  # No path of this machine
    return text if default in (None, MISSING) or "default:" in text else f"{text} [{default}]"


def described(action: argparse.Action, text: str | None) -> dict:
    "A setting as `rlhf_nb.program` reads it."
    told = dict(name=action.dest, takes=takes(action), help=text)
    if action.nargs: told["nargs"] = action.nargs
    if action.choices: told["choices"] = [*map(str, action.choices)]
    return told


def command(name: str) -> dict:
    "What a command does, and its settings by groups."
    parser = Parser(name)
    found = {action.dest: action for action in reversed(parser._actions)}  # --no_x comes after --x, whose dest it has
    groups = {ORIGINAL: []}
    for c in COMMANDS[name].dataclasses:
        for f in fields(c):
            inherited = c is PPOConfig and f.name not in c.__annotations__
            title = TRAINING if inherited else c.__doc__.rstrip(".")
            groups.setdefault(title, []).append(described(found[f.name], does(f, parser.defaults)))
    originals = [(old, today) for old, today in NAMES.items() if today in found]
    groups[ORIGINAL] = [described(found[today], today) | dict(name=old) for old, today in originals]
    if TRAINING in groups: groups[TRAINING] = groups.pop(TRAINING)
    off = [action.option_strings[0].lstrip("-") for action in parser._actions if action.const is False]
    return dict(does=parser.description, positionals=COMMANDS[name].positionals,
                groups={title: group for title, group in groups.items() if group}, off=off)


def options() -> str:
    "The file."
    told = {name: command(name) for name in COMMANDS}
    told["completion"] = dict(does=completion.__doc__, positionals=dict(shell=None), groups={}, off=[])
    libraries = {name: version(name) for name in ("transformers", "trl")}
    return json.dumps(dict(libraries=libraries, commands=told), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__": OUT.write_text(options(), encoding="utf-8")
