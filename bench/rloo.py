"""TRL's RLOOTrainer beside ours on a GPU, same models, prompts, lengths and batch: rloo.py OUT.json

RLOO has no critic, and needs two completions of a prompt: its update is one prompt answered twice, ours is two prompts.
Both pass over them four times, in minibatches of one; both have the same adapter and a KL penalty from it."""
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from found import Found, Until, arguments, on_gpu
from models import SHAPES
from peak import peak_gb
from peer_rloo import Clock, their_trainer
from t4 import models_of

HERE = Path(__file__).parent


def our_seconds(models: Path, shape: str, updates: int) -> dict:
    "What ours.py tells: seconds of each update, peak."
    command = [sys.executable, HERE/"ours.py", models, shape, "--steps", updates, "--dtype", "float16"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode: raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main(found: Found, args):
    "Ours in its own process, then theirs in this one."
    shape, updates = ("tiny", 1) if args.quick else ("560m", 3)
    s = SHAPES[shape]
    models = models_of(shape, args.work)
    rows = {}
    with found.attempt("ours"):
        ours = our_seconds(models, shape, updates)
        rows["ours"] = ours["seconds"], ours["peak_gb"]
        found.row(**told("PPOTrainer, with a critic", *rows["ours"]))
    with found.attempt("RLOOTrainer", ours=False):
        if on_gpu(): torch.cuda.reset_peak_memory_stats()
        dtype = torch.float16 if on_gpu() else torch.float32
        trainer = their_trainer(models, shape, s["epochs"][-1], updates, dtype, args.work)
        clock = Clock(s["minibatches"] * s["epochs"][-1])
        for callback in (clock, Until(found.end)): trainer.add_callback(callback)
        trainer.train()
        last = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry][-1]
        rows["RLOO"] = clock.seconds(), peak_gb()
        found.row(**told("TRL's RLOOTrainer, without a critic", *rows["RLOO"]))
        found.note(f"RLOOTrainer's completions have {last['completions/mean_length']:.0f} tokens in the mean")
    found.note("An update: 2 completions, 4 epochs, minibatches of one, float16; RLOO has no critic, and its two "
               "completions are of one prompt.")
    best = {name: median(seconds[1:] or seconds) for name, (seconds, _) in rows.items() if seconds}
    found.write(figures=", ".join(f"{name} {seconds:.2f} s per update" for name, seconds in best.items()))


def told(name: str, seconds: list[float], peak: float) -> dict: # GB
    "A row of the table; the first update warms up where there are more."
    each = seconds[1:] or seconds
    return {"trainer": name, "s per update": median(each) if each else None, "updates": len(seconds),
            "first update, s": seconds[0] if seconds else None, "peak, GB": peak}


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    found = Found(args)
    main(found, args)
    raise SystemExit(found.exit_status())
