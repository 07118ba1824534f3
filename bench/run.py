"""Our PPOTrainer and TRL's last one in turn, beside what the machine can do: run.py WORK_FOLDER PEER_PYTHON RESULTS_JSON [SHAPE ...]"""
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
    x, w = torch.randn(512, 1024).bfloat16(), torch.randn(16_384, 1024).bfloat16()
    return dict(read=1.2e9 / best_of(lambda: torch.dot(a, b)), operations=2 * 512 * 1024 * 16_384 / best_of(lambda: x @ w.T, 20),
                cores=torch.get_num_threads())


def floor(shape: str, rates: dict[str, float]) -> dict[str, float]: # Seconds by phase
    "What bytes and operations alone would take, weights in two bytes, adapters and attention not counted."
    s = SHAPES[shape]
    body, head = (lambda layers, hidden: 12 * layers * hidden ** 2)(s["policy"][0], s["policy"][2]), s["policy"][2] * s["policy"][3]
    reader = 12 * s["reward"][0] * s["reward"][2] ** 2
    both = s["prompt"] + s["response"]
    once = 2 * s["batch"] * (body * both + head * s["response"])
    each_token = max(2 * (body + head) / rates["read"], 2 * s["batch"] * (body + head) / rates["operations"])
    return dict(write=s["response"] * each_token + 2 * s["batch"] * body * s["prompt"] / rates["operations"], look=2 * once / rates["operations"],
                reward=2 * s["batch"] * reader * min(both, 512) / rates["operations"], update=2 * s["epochs"] * once / rates["operations"])


def last_line(*command) -> dict:
    "The JSON that a program ends with."
    run = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if run.returncode: sys.exit(run.stderr[-2000:])
    return json.loads(run.stdout.splitlines()[-1])


def measure(shape: str, work: Path, peer: str) -> dict:
    "Ours, theirs, ours: so that a machine that changes its pace does so for both; then ours with answers written in int8."
    steps = SHAPES[shape]["steps"]
    if not (work/shape/"prompts.jsonl").exists(): make(shape, work/shape)
    ours = lambda *more: last_line(sys.executable, HERE/"ours.py", work/shape, shape, "--steps", steps, *more)
    runs = [ours()]
    theirs = last_line(peer, HERE/"peer.py", work/shape, json.dumps(SHAPES[shape]), "--steps", steps)
    runs.append(ours())
    int8 = ours("--int8")
    every = [step for run in runs for step in run["steps"]]
    return dict(ours={k: median(step[k] for step in every) for k in every[0]}, seconds=median(x for run in runs for x in run["seconds"]),
                peak_gb=max(run["peak_gb"] for run in runs), their_seconds=median(theirs["seconds"]), their_peak_gb=theirs["peak_gb"], steps=steps,
                int8={k: median(step[k] for step in int8["steps"]) for k in every[0]}, int8_seconds=median(int8["seconds"]))


def table(shape: str, found: dict, least: dict[str, float]) -> Table:
    "Seconds of an update by phase."
    s = SHAPES[shape]
    done = dict(write=s["response"], look=2 * (s["prompt"] + s["response"]), reward=s["prompt"] + s["response"], update=s["epochs"] * (s["prompt"] + s["response"]))
    out = Table("", "seconds", "tokens/s", "floor, s", "times the floor", title=f"{shape}: one update, {found['seconds']:.1f} s")
    for phase, seconds in found["ours"].items():
        out.add_row(phase, f"{seconds:.2f}", f"{s['batch'] * done[phase] / seconds:,.0f}", f"{least[phase]:.2f}", f"{seconds / least[phase]:.1f}")
    out.add_row("all", f"{found['seconds']:.2f}", "", f"{sum(least.values()):.2f}", f"{found['seconds'] / sum(least.values()):.1f}")
    out.add_row("TRL 1.12", f"{found['their_seconds']:.2f}", "", "", f"{found['their_seconds'] / found['seconds']:.1f} times ours")
    out.add_row("with rollout_int8", f"{found['int8_seconds']:.2f}", "", "", f"TRL {found['their_seconds'] / found['int8_seconds']:.1f} times that")
    out.add_row("peak memory, GB", f"{found['peak_gb']:.2f}", "", "", f"TRL {found['their_peak_gb']:.2f}")
    return out


if __name__ == "__main__":
    work, peer, results, *shapes = sys.argv[1:]
    found = json.loads(Path(results).read_text()) if Path(results).exists() else {}
    for shape in shapes or SHAPES:
        rates = machine()
        print(f"{rates['cores']} cores; {rates['read'] / 1e9:.0f} GB/s read, {rates['operations'] / 1e9:.0f} GFLOP/s in bfloat16")
        found[shape] = measure(shape, Path(work), peer) | dict(floor=floor(shape, rates), machine=rates)
        Console().print(table(shape, found[shape], found[shape]["floor"]))
        Path(results).write_text(json.dumps(found, indent=1) + "\n")
