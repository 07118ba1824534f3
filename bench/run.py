"""Our PPOTrainer, TRL's last one, and the limits of the machine: run.py WORK PEER_PYTHON RESULTS [SHAPE ...]"""
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

HERE = Path(__file__).parent
# Keys of the results, and their names
PHASES = dict(write="generate", look="log-probs", reward="rewards", update="update")


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


def weights(layers: int, hidden: int) -> int:
    "In the layers of a transformer."
    return 12 * layers * hidden ** 2


def floor(shape: str, rates: dict[str, float]) -> dict[str, float]: # Seconds by phase
    "What bytes and operations alone would take, weights in two bytes, adapters and attention not counted."
    s = SHAPES[shape]
    read, operations = rates["read"], rates["operations"]
    layers, _, hidden, vocab = s["policy"]
    body, head = weights(layers, hidden), hidden * vocab
    layers, _, hidden, _ = s["reward"]
    reward = weights(layers, hidden)
    both = s["prompt"] + s["response"]
    forward = 2 * s["batch"] * (body * both + head * s["response"])
    token = max(2 * (body + head) / read, 2 * s["batch"] * (body + head) / operations)
    return dict(
        write=s["response"] * token + 2 * s["batch"] * body * s["prompt"] / operations,
        look=2 * forward / operations,
        reward=2 * s["batch"] * reward * min(both, 512) / operations,
        update=2 * s["epochs"] * forward / operations,
    )


def last_line(*command) -> dict:
    "The JSON that a program ends with."
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if run.returncode: sys.exit(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    "By phase."
    return {phase: median(step[phase] for step in steps) for phase in PHASES}


def measure(shape: str, work: Path, peer: str) -> dict:
    "Ours, theirs, ours, because a machine may change its pace; then ours with completions generated in int8."
    steps = SHAPES[shape]["steps"]
    models = work/shape
    if not (models/"prompts.jsonl").exists(): make(shape, models)
    ours = [sys.executable, HERE/"ours.py", models, shape, "--steps", steps]
    before = last_line(*ours)
    theirs = last_line(peer, HERE/"peer.py", models, json.dumps(SHAPES[shape]), "--steps", steps)
    after = last_line(*ours)
    int8 = last_line(*ours, "--int8")
    return dict(
        ours=medians(before["steps"] + after["steps"]),
        seconds=median(before["seconds"] + after["seconds"]),
        peak_gb=max(before["peak_gb"], after["peak_gb"]),
        their_seconds=median(theirs["seconds"]),
        their_peak_gb=theirs["peak_gb"],
        steps=steps,
        int8=medians(int8["steps"]),
        int8_seconds=median(int8["seconds"]),
    )


def table(shape: str, found: dict, least: dict[str, float]) -> Table:
    "Seconds of an update by phase."
    s = SHAPES[shape]
    ours, theirs, int8, shortest = found["seconds"], found["their_seconds"], found["int8_seconds"], sum(least.values())
    both = s["prompt"] + s["response"]
    tokens = dict(write=s["response"], look=2 * both, reward=both, update=s["epochs"] * both) # Of a completion
    out = Table("", "seconds", "tokens/s", "floor, s", "times the floor", title=f"{shape}: one update, {ours:.1f} s")
    for phase, name in PHASES.items():
        spent = found["ours"][phase]
        rate = s["batch"] * tokens[phase] / spent
        out.add_row(name, f"{spent:.2f}", f"{rate:,.0f}", f"{least[phase]:.2f}", f"{spent / least[phase]:.1f}")
    out.add_row("all", f"{ours:.2f}", "", f"{shortest:.2f}", f"{ours / shortest:.1f}")
    out.add_row("TRL 1.12", f"{theirs:.2f}", "", "", f"{theirs / ours:.1f} times ours")
    out.add_row("with rollout_int8", f"{int8:.2f}", "", "", f"TRL {theirs / int8:.1f} times that")
    out.add_row("peak memory, GB", f"{found['peak_gb']:.2f}", "", "", f"TRL {found['their_peak_gb']:.2f}")
    return out


def main(work: Path, peer: str, results: Path, shapes: list[str]):
    "Measure, print and save one shape after the other."
    found = json.loads(results.read_text()) if results.exists() else {}
    for shape in shapes:
        rates = machine()
        read, operations = rates["read"] / 1e9, rates["operations"] / 1e9
        print(f"{rates['cores']} cores; {read:.0f} GB/s read, {operations:.0f} GFLOP/s in bfloat16")
        found[shape] = measure(shape, work, peer) | dict(floor=floor(shape, rates), machine=rates)
        Console().print(table(shape, found[shape], found[shape]["floor"]))
        results.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    work, peer, results, *shapes = sys.argv[1:]
    main(Path(work), peer, Path(results), shapes or list(SHAPES))
