"""What only a GPU can tell, measured within minutes: gpu.py OUTDIR [--quick] [--only NAME ...] [--minutes 9]

Writes OUTDIR/gpu.json and OUTDIR/gpu.md after every step, and OUTDIR/NAME.log. Nothing is downloaded: models are random
ones of real shapes. Exit status 1 if a step failed."""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
LAST_WORDS = 5 # Seconds that a step has for what it does after its time
FEWEST = 20    # Seconds without which no step is begun
PYTEST = "-q", "--continue-on-collection-errors" # Where a library for the tests is missing, the others run


class Step(NamedTuple):
    "A program that runs on its own."
    name: str
    told: str      # What it measures
    share: float   # Of the time; what a step does not use goes to those after it
    program: str   # In this folder


STEPS = [ # Those that would be missed most come first
    Step("suite", "tests on the GPU: `tests/gpu`", 2.6, ""),
    Step("t4", "the original's run in fp16 within 15 GiB, BLOOM 560m and DeBERTa", 1.6, "t4.py"),
    Step("decode", "milliseconds per token: eager loop, CUDA graph, transformers' `generate`", 2.2, "decode.py"),
    Step("resume", "a resumed run beside the uninterrupted one, bit for bit", 1, "resume.py"),
    Step("peer", "TRL's RLOOTrainer on the same models, prompts and batch; it has no critic", 1.2, "rloo.py"),
    Step("shapes", "an update of Gemma 3 and Qwen3 shapes, fp16 and bf16", 1, "shapes.py"),
    Step("learn", "the clinic's true reward before and after a run", 1, "learn.py"),
    Step("logits", "log-probs from logits in half precision, against float32", .3, "logits.py"),
]


# Running


def environment() -> dict[str, str]:
    "This package is found, the network is not asked, and output comes as it is printed."
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | dict(PYTHONPATH=os.pathsep.join(paths), PYTHONUNBUFFERED="1", HF_HUB_OFFLINE="1",
                             TOKENIZERS_PARALLELISM="false")


def command_of(step: Step, found: Path, work: Path, seconds: float, quick: bool) -> list[str]:
    "Its command line."
    if step.name == "suite": return [sys.executable, "tests/gpu/run.py", *PYTEST]
    more = ["--quick"] if quick else []
    given = ["--work", work, "--seconds", seconds - 2 * LAST_WORDS, *more]
    return [*map(str, [sys.executable, HERE/step.program, found, *given])]


def end(process: subprocess.Popen):
    "Interrupt a step and the processes that it started, as Ctrl-C does, then kill them."
    for number in (signal.SIGINT, signal.SIGKILL):
        try: os.killpg(process.pid, number)
        except ProcessLookupError: return
        try: process.wait(LAST_WORDS / 2)
        except subprocess.TimeoutExpired: continue


def run(command: list[str], log: Path, seconds: float) -> str: # Why it failed; empty: it did not
    "Run a command with its output in the log, for so long at most."
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=file,
                                   stderr=subprocess.STDOUT, process_group=0)
        try: status = process.wait(seconds - LAST_WORDS)
        except subprocess.TimeoutExpired: return f"stopped after {seconds - LAST_WORDS:.0f} s"
        finally: end(process)
    return f"exit status {status}: {last_words(log)}" if status else ""


def last_words(log: Path, most: int = 200) -> str:
    "The error that a log ends with, or its last line."
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines[-40:] if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or ["no output"])[-1][:most]


LETTERS = {".": "passed", "F": "failed", "E": "error", "s": "skipped"} # Of pytest's progress


def suite_counts(text: str) -> dict[str, int]: # pytest's output
    "From the summary; from the progress if it was stopped before."
    summaries = re.findall(r"^.*\b\d+ (?:passed|failed|skipped|error).* in [\d.:]+.*$", text, re.M)
    if summaries:
        found = re.findall(r"(\d+) (\w+)", summaries[-1].split(" in ")[0])
        return {name: int(n) for n, name in found if not name.startswith("warning")}
    progress = "".join(re.findall(r"^([.FEsxX]+)(?=\s|Traceback|$)", text, re.M))
    return {name: progress.count(letter) for letter, name in LETTERS.items() if letter in progress}


def suite_found(log: Path) -> dict[str, Any]:
    "Counts and names of failures, from pytest's output."
    text = log.read_text(encoding="utf-8", errors="replace")
    counts = suite_counts(text)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    figures = ", ".join(f"{n} {name}" for name, n in counts.items())
    return dict(figures=figures, counts=counts, failed=failed, notes=[f"failed: {name}" for name in failed])


def run_step(step: Step, out: Path, work: Path, seconds: float, quick: bool) -> dict[str, Any]:
    "A step's findings, how it ended, and how long it took."
    log, found = out/f"{step.name}.log", work/f"{step.name}.json"
    start = time.monotonic()
    try: reason = run(command_of(step, found, work, seconds, quick), log, seconds)
    except OSError as error: reason = f"cannot run: {error}"
    took = round(time.monotonic() - start, 1)
    if step.name == "suite": told = suite_found(log)
    else: told = json.loads(found.read_text()) if found.exists() else {}
    if reason and told.get("problems"): reason = told["problems"][0]
    if reason and told.get("failed"): reason = ", ".join(told["failed"])[:400]
    return dict(outcome="failed" if reason else "done", reason=reason, took=took, limit=round(seconds, 1)) | told


# Writing


def cell(value: Any) -> str:
    "A value as a table shows it."
    if value is None: return ""
    if isinstance(value, bool): return "yes" if value else "no"
    if isinstance(value, float): return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(rows: list[dict[str, Any]]) -> list[str]: # Lines
    "Markdown; a column for every name that a row has."
    names = [*dict.fromkeys(name for row in rows for name in row)]
    lines = [names, ["---"] * len(names), *([row.get(name) for name in names] for row in rows)]
    return [f"| {' | '.join(map(cell, line))} |" for line in lines]


def outcome(name: str, done: dict[str, Any], pretended: bool) -> str: # Of a step
    "How it ended, with the reason where it failed."
    found = done.get(name)
    if found is None: return "not reached"
    told = found["outcome"] + (f": {found['reason']}" if found["reason"] else "")
    if lacking := found.get("lacking"):
        told += f", without {lacking[0]}" + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
    return f"pretended: {told}" if pretended else told


def page(facts: dict[str, Any], done: dict[str, Any], steps: list[Step]) -> str:
    "The Markdown page; of a pretended GPU it has no figures."
    pretended = facts["pretended"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    memory = f"{facts['memory'] / 2**30:.1f} GiB, CUDA {facts['cuda_version']}"
    lines = [
        f"# Measured on {facts['card']}",
        "",
        f"{facts['date']}: {facts['card']} ({memory}), Python {facts['python']}, {versions}. "
        "`make test-gpu` repeats it; models are random ones of the shapes named.",
        "",
    ]
    if pretended: lines += ["**The GPU is pretended: the steps ran, and nothing was measured.**", ""]
    rows = []
    for step in steps:
        figures = "not measured" if pretended else done.get(step.name, {}).get("figures", "")
        rows.append(dict(step=step.name, what=step.told, result=outcome(step.name, done, pretended), figures=figures))
    lines += table(rows)
    for step in steps:
        found = done.get(step.name, {})
        if pretended or not (found.get("table") or found.get("notes")): continue
        lines += ["", f"## {step.name}: {step.told}", ""]
        if found.get("table"): lines += [*table(found["table"]), ""]
        lines += [f"- {cell(note)}" for note in found.get("notes", [])]
    return "\n".join(lines).rstrip() + "\n"


def write(out: Path, facts: dict[str, Any], done: dict[str, Any], steps: list[Step]):
    "Both files; a reader never finds half of one."
    texts = {"gpu.json": json.dumps(dict(facts=facts, steps=done), indent=1) + "\n", "gpu.md": page(facts, done, steps)}
    for name, text in texts.items():
        new = out/f"{name}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(out/name)


def main(argv: list[str] | None = None) -> int: # Exit status
    "Every step, as long as there is time."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few updates: to see that every step runs")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], help="these steps")
    parser.add_argument("--minutes", type=float, default=9)
    args = parser.parse_args(argv)
    begin = time.monotonic()
    last = begin + 60 * args.minutes
    command = [sys.executable, HERE/"found.py"]
    asked = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    if asked.returncode: sys.exit(asked.stderr[-2000:])
    facts = json.loads(asked.stdout.splitlines()[-1])
    if not facts["cuda"]: sys.exit("No CUDA device: nothing is measured.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1)) # So that `run` ends the step at hand
    args.out.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if not args.only or step.name in args.only]
    done: dict[str, Any] = {}
    write(args.out, facts, done, steps)
    with tempfile.TemporaryDirectory() as work:
        for i, step in enumerate(steps):
            left = last - time.monotonic()
            if left < FEWEST: break
            seconds = max(FEWEST, left * step.share / sum(each.share for each in steps[i:]))
            print(f"{step.name}: at most {seconds:.0f} s ...", flush=True)
            done[step.name] = run_step(step, args.out, Path(work), seconds, args.quick)
            write(args.out, facts, done, steps)
            found = done[step.name]
            told = found["reason"] or found.get("figures", "")
            print(f"{step.name}: {found['outcome']} in {found['took']} s. {told}", flush=True)
    for step in steps:
        if step.name not in done: print(f"{step.name}: not reached")
    print(f"{args.out/'gpu.md'}, {time.monotonic() - begin:.0f} s")
    return int(any(found["outcome"] == "failed" for found in done.values()))


if __name__ == "__main__": sys.exit(main())
