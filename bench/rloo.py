"""TRL's RLOOTrainer beside ours, same models, prompts, lengths and batch: rloo.py OUT.json

RLOO has no critic, and needs two completions of a prompt: its update is one prompt answered twice, ours is two prompts.
Both pass over them four times, in minibatches of one; both have the same adapter and a KL penalty from it."""
import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import torch
from datasets import Dataset
from found import Found, Until, arguments, on_gpu, wait
from models import SHAPES
from peak import peak_gb
from peft import LoraConfig
from t4 import models_of
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from rlhf_nb.rewards import load_reward_model

HERE = Path(__file__).parent


def prompts(models: Path, most: int) -> Dataset: # Most tokens of a prompt
    "The last tokens of each, as our trainer reads them."
    tok = AutoTokenizer.from_pretrained(f"{models}/policy")
    texts = [json.loads(line)["prompt"] for line in open(models/"prompts.jsonl", encoding="utf-8")]
    return Dataset.from_list([dict(prompt=tok.decode(tok(text).input_ids[-most:])) for text in texts])


def our_seconds(models: Path, shape: str, updates: int) -> dict:
    "What ours.py tells: seconds of each update, peak."
    command = [sys.executable, HERE/"ours.py", models, shape, "--steps", updates, "--dtype", "float16"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)
    if done.returncode: raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout.splitlines()[-1])


def their_trainer(models: Path, shape: str, updates: int, work: Path) -> RLOOTrainer:
    "The same batch, epochs, lengths, learning rate and adapter, in float16."
    s = SHAPES[shape]
    dtype = torch.float16 if on_gpu() else torch.float32
    tok = AutoTokenizer.from_pretrained(f"{models}/policy", padding_side="left")
    device = torch.device("cuda" if on_gpu() else "cpu")
    reward = load_reward_model(f"{models}/reward", dtype, device, batch_size=16)
    per_update = s["minibatches"] * s["epochs"] # Optimizer steps
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{models}/policy", dtype=dtype),
        reward_funcs=reward,
        args=RLOOConfig(
            output_dir=mkdtemp(dir=work),
            per_device_train_batch_size=s["batch"] // s["minibatches"],
            steps_per_generation=s["minibatches"],
            num_generations=2,
            num_iterations=s["epochs"],
            max_steps=per_update * updates,
            learning_rate=1e-5,
            max_completion_length=s["response"],
            generation_kwargs=dict(min_new_tokens=s["response"]),
            beta=.05,
            gradient_checkpointing=False,
            fp16=on_gpu(),
            bf16=False,
            use_cpu=not on_gpu(),
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=prompts(models, s["prompt"]),
        processing_class=tok,
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=.05, task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class Clock(TrainerCallback):
    "When each update ended, of so many optimizer steps; the first entry is the beginning."

    def __init__(self, per_update: int):
        self.per_update, self.times = per_update, []

    def note(self):
        wait()
        self.times.append(time.perf_counter())

    def on_train_begin(self, *args, **kwargs): self.note()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.per_update == 0: self.note()


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
        trainer = their_trainer(models, shape, updates, args.work)
        clock = Clock(s["minibatches"] * s["epochs"])
        for callback in (clock, Until(found.end)): trainer.add_callback(callback)
        trainer.train()
        last = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry][-1]
        rows["RLOO"] = [b - a for a, b in pairwise(clock.times)], peak_gb()
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
