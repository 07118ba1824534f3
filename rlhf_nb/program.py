"""The program `rlhf-nb` up to its commands: version, help, completion and misspelt settings need no torch.

What it knows of the settings is in `templates/options.json`, which `tools/options.py` writes.
"""

import argparse
import json
import os
import re
import shutil
import sys
from importlib.metadata import version
from importlib.resources import files
from typing import NoReturn

from . import __version__
from .tables import unknown_settings

TABLE = json.loads(files("rlhf_nb").joinpath("templates/options.json").read_text(encoding="utf-8"))
LIBRARIES, OPTIONS = TABLE["libraries"], TABLE["commands"] # Versions that the table is of; settings by command
HELP_AT = 42  # Column
AFTER_HELP = """--config FILE.yaml reads the same names; --quiet shows results and warnings only;
--debug shows where an error came from."""


class Help(argparse.RawDescriptionHelpFormatter):
    "Each setting under one name, with what it takes."
    def __init__(self, prog: str): super().__init__(prog, 2, HELP_AT, min(shutil.get_terminal_size().columns, 120))

    def _format_action_invocation(self, action: argparse.Action) -> str: return f"--{action.dest} {action.metavar}"


class Parser(argparse.ArgumentParser):
    "The settings of a command by groups, each with what it takes, what it does and its default."
    def __init__(self, name: str): # Of the command
        does, positionals, groups, off = OPTIONS[name].values()
        super().__init__(f"rlhf-nb {name}", description=does, add_help=False, allow_abbrev=False)
        self.first = [self.add_argument(at, nargs=n, metavar=at.upper()) for at, n in positionals.items()]
        self.groups = {title: [self.add_setting(told) for told in group] for title, group in groups.items()}
        for each in off: self.add_argument(f"--{each}", action="store_false", help=argparse.SUPPRESS)

    def add_setting(self, told: dict) -> argparse.Action:
        "An option as `tools/options.py` describes it; without help it is hidden."
        text = told["help"]
        return self.add_argument(f"--{told['name']}", nargs=told.get("nargs"), choices=told.get("choices"),
                                 metavar=told["takes"], help=argparse.SUPPRESS if text is None else text)

    def error(self, message: str): raise ValueError(message)

    def format_help(self) -> str:
        page = Help(self.prog)
        page.add_usage(None, [*self.first, argparse.Action([], "settings", nargs="*", metavar="--setting value")], [])
        page.add_text(self.description)
        for title, actions in self.groups.items():
            page.start_section(title)
            page.add_arguments(actions)
            page.end_section()
        page.add_text(AFTER_HELP)
        return page.format_help()

    def unknown(self, words: list[str]) -> str | None: # For an error message
        "What can be said of unknown settings among the words without torch; None: nothing, and `cli` may say more."
        names = [word[2:].split("=")[0] for word in words if word.startswith("--")]
        names = [name.replace("-", "_") for name in names if " " not in name] # Else it is a value
        if "RANK" in os.environ or not {"config", "accelerate_config"}.isdisjoint(names): return None
        known = [action.dest for action in self._actions]
        wrong = [name for name in names if name not in {*known, "debug", "quiet"}]
        # Libraries of other versions may have other settings
        if not wrong or {name: version(name) for name in LIBRARIES} != LIBRARIES: return None
        return unknown_settings(wrong, known)


def program(complete: bool = False) -> argparse.ArgumentParser: # With the settings of each command?
    "The parser of everything up to the command."
    top = argparse.ArgumentParser(
        prog="rlhf-nb", description="PPO for language models.", epilog="rlhf-nb COMMAND --help lists its settings."
    )
    top.add_argument("--version", action="version", version=f"rlhf-nb {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for name, told in OPTIONS.items():
        own = dict(parents=[Parser(name)] if complete else [], conflict_handler="resolve")
        commands.add_parser(name, add_help=False, help=told["does"], **own)
    return top


def completion(words: list[str]):
    "Print what a shell (bash, zsh, ...) needs to complete commands and settings."
    import shtab  # Not above: a tenth of a second

    words = [word for word in words if not re.fullmatch(r"--(debug|quiet)(=.*)?", word)]
    shell = Parser("completion").parse_args(words).shell
    if shell not in shtab.SUPPORTED_SHELLS:
        raise ValueError(f"{shell}: must be one of {', '.join(shtab.SUPPORTED_SHELLS)}")
    print(shtab.complete(program(complete=True), shell))


def fail(command: str, message: str) -> NoReturn:
    "An error of one line."
    print(f"rlhf-nb {command}: {message}", file=sys.stderr)
    sys.exit(2)


def main(argv: list[str] | None = None): # Default: the program's own
    "The program `rlhf-nb`."
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="replace")
    top, words = program(), argv[1:]
    command = top.parse_args(argv[:1]).command
    if command is None: return top.print_help()
    parser = Parser(command)
    flags = words[:words.index("--")] if "--" in words else words
    if not {"-h", "--help"}.isdisjoint(flags): return parser.print_help()
    if unknown := parser.unknown(flags): fail(command, unknown)
    if command == "completion":
        try: return completion(words)
        except ValueError as e: fail(command, str(e))
    # Threads that wait in a loop make a busy machine seven times as slow; libgomp reads this when torch loads it
    if "OMP_WAIT_POLICY" not in os.environ: os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from .cli import run  # Not above: torch and transformers take seconds
    run(command, words)
