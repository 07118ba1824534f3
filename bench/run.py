"""Our PPOTrainer, TRL's trainers, and the limits of the machine: run.py WORK PEER_PYTHON RESULTS [SHAPE ...]"""
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch
from models import SHAPES, make
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

HERE = Path(__file__).parent
# Keys of the results, and their names
PHASES = dict(write="generate", look="log-probs", reward="rewards", update="update")
TRAINERS = dict(ppo="TRL 1.12 PPO", rloo="TRL 1.16 RLOO")
PEER_UPDATES = 2


def best_of(work, n: int = 5) -> float: # Seconds
    "The shortest of n, after one that does not count."
    work()
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> dict[str, float]:
    "Bytes read a second, and bfloat16 operations a second, at sizes beyond the caches."
    a, b = torch.ones(2, 150_000_000)
    x = torch.randn(512, 1024).bfloat16()
    w = torch.randn(16_384, 1024).bfloat16()
    read = a.nbytes + b.nbytes
    operations = 2 * x.numel() * len(w)
    return dict(read=read / best_of(lambda: torch.dot(a, b)), operations=operations / best_of(lambda: x @ w.T, 20),
                cores=torch.get_num_threads())


def weights(config: PretrainedConfig, auto: type) -> tuple[int, int]: # In all layers, and in the output layer
    "Numbers in the matrices that a token is multiplied with."
    with torch.device("meta"): model = auto.from_config(config)
    head = model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return linear, 0 if head is None else head.weight.numel()


def floor(shape: str, epochs: int, rates: dict[str, float]) -> dict[str, float]: # Seconds by phase
    "What bytes and operations alone would take, weights in two bytes, adapters and attention not counted."
    s = SHAPES[shape]
    read, operations = rates["read"], rates["operations"]
    body, head = weights(s["policy"], AutoModelForCausalLM)
    reward, _ = weights(s["reward"], AutoModelForSequenceClassification)
    both = s["prompt"] + s["response"]
    forward = 2 * s["batch"] * (body * both + head * s["response"])
    token = max(2 * (body + head) / read, 2 * s["batch"] * (body + head) / operations)
    return dict(
        write=s["response"] * token + 2 * s["batch"] * body * s["prompt"] / operations,
        look=2 * forward / operations,
        reward=2 * s["batch"] * reward * min(both, 512) / operations,
        update=2 * epochs * forward / operations,
    )


def last_line(*command) -> dict:
    "The JSON that a program ends with."
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if run.returncode: sys.exit(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def later(seconds: list[float]) -> float:
    "The median of all updates but the first, which is told apart."
    return median(seconds[1:] or seconds)


def measure(shape: str, epochs: int, models: Path, python: str) -> dict:
    "Ours, theirs, ours, because a machine may change its pace."
    ours = [sys.executable, HERE/"ours.py", models, shape, "--steps", SHAPES[shape]["steps"], "--epochs", epochs]
    numbers = {name: x for name, x in SHAPES[shape].items() if name not in ("policy", "reward")} | dict(epochs=epochs)
    runs = [last_line(*ours)]
    peers = dict(
        ppo=last_line(python, HERE/"peer.py", models, json.dumps(numbers), "--steps", PEER_UPDATES),
        rloo=last_line(sys.executable, HERE/"peer_rloo.py", models, shape, "--steps", PEER_UPDATES, "--epochs", epochs),
    )
    runs.append(last_line(*ours))
    steps = [step for run in runs for step in run["steps"][1:]]
    return dict(
        ours={phase: median(step[phase] for step in steps) for phase in PHASES},
        seconds=later([0., *(sum(step.values()) for step in steps)]),
        first=max(run["seconds"][0] for run in runs),
        peak_gb=max(run["peak_gb"] for run in runs),
        peers={name: dict(seconds=later(found["seconds"]), peak_gb=found["peak_gb"]) for name, found in peers.items()},
    )


def table(shape: str, epochs: int, found: dict) -> Table:
    "Seconds of an update by phase, and of the peers."
    s, least = SHAPES[shape], found["floor"]
    both = s["prompt"] + s["response"]
    tokens = dict(write=s["response"], look=2 * both, reward=both, update=epochs * both) # Of a completion
    title = f"{shape}: one update, {epochs} pass{'es' * (epochs > 1)}"
    out = Table("", "seconds", "tokens/s", "floor, s", "times the floor", "peak, GB", title=title)
    for phase, name in PHASES.items():
        spent = found["ours"][phase]
        rate = s["batch"] * tokens[phase] / spent
        out.add_row(name, f"{spent:.2f}", f"{rate:,.0f}", f"{least[phase]:.2f}", f"{spent / least[phase]:.1f}")
    ours, shortest = found["seconds"], sum(least.values())
    out.add_row("all", f"{ours:.2f}", "", f"{shortest:.2f}", f"{ours / shortest:.1f}", f"{found['peak_gb']:.2f}")
    out.add_row("the first update", f"{found['first']:.2f}", "", "", f"{found['first'] / ours:.2f} times a later one")
    for name, peer in found["peers"].items():
        ratio = f"{peer['seconds'] / ours:.1f} times ours"
        out.add_row(TRAINERS[name], f"{peer['seconds']:.2f}", "", "", ratio, f"{peer['peak_gb']:.2f}")
    return out


def main(work: Path, python: str, results: Path, shapes: list[str]):
    "Measure, print and save one shape after the other."
    found = json.loads(results.read_text()) if results.exists() else {}
    jobs = [(i, shape, epochs) for shape in shapes for i, epochs in enumerate(SHAPES[shape]["epochs"])]
    for _, shape, epochs in sorted(jobs, key=lambda job: job[0]): # One pass of every shape first
        rates = machine()
        read, operations = rates["read"] / 1e9, rates["operations"] / 1e9
        print(f"{rates['cores']} cores; {read:.0f} GB/s read, {operations:.0f} GFLOP/s in bfloat16", flush=True)
        models = work/shape
        if not (models/"prompts.jsonl").exists(): make(shape, models)
        row = measure(shape, epochs, models, python) | dict(floor=floor(shape, epochs, rates), machine=rates)
        found.setdefault(shape, {})[str(epochs)] = row
        Console().print(table(shape, epochs, row))
        results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    work, python, results, *shapes = sys.argv[1:]
    main(Path(work), python, Path(results), shapes or list(SHAPES))
