"""How the cost of an update grows: growth.py OUT.json [AXIS ...]"""
import io
import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from peft import LoraConfig
from phases import timed_update
from transformers import AutoModelForCausalLM, LlamaConfig, TrainerControl, TrainerState

from rlhf_nb.config import PPOConfig
from rlhf_nb.diagnosis import Doctor
from rlhf_nb.report import Lines
from rlhf_nb.testing import policy_tokenizer, shipped_rows, shipped_texts
from rlhf_nb.trainer import PPOTrainer

BASE = dict(prompts=16, completion=64, hidden=256, vocabulary=8192, adapters=1)
AXES = {
    "prompts": (8, 16, 32, 64, 128),        # Per update
    "completion": (16, 64, 256, 1024),      # Tokens
    "hidden": (128, 256, 512, 1024),        # Size of the hidden states; four layers
    "vocabulary": (8192, 32768, 131072, 262144),
    "adapters": (1, 2, 3),                  # The policy's; and the critic's; and the reference's
}
PROMPT = 64
UPDATES = 4


def trainer_of(prompts: int, completion: int, hidden: int, vocabulary: int, adapters: int) -> PPOTrainer:
    "A Llama of four layers with random weights in bfloat16, one pass over the completions of an update."
    tok = policy_tokenizer()
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=4,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, head_dim=64, tie_word_embeddings=True,
        max_position_embeddings=4096)
    torch.manual_seed(0)
    ids = tok(" ".join(shipped_texts())).input_ids
    rows = [dict(prompt=tok.decode(ids[i * PROMPT:(i + 1) * PROMPT + 40])) for i in range(prompts)]
    # PiSSA-like starts need a copy of the adapter as the reference
    lora = LoraConfig(r=8, lora_alpha=16, init_lora_weights=adapters < 3, task_type="CAUSAL_LM")
    return PPOTrainer(
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16),
        lambda completions, **_: [0.] * len(completions),
        PPOConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=prompts,
            max_steps=UPDATES,
            max_prompt_length=PROMPT,
            max_completion_length=completion,
            min_completion_length=completion,
            critic="adapter" if adapters > 1 else "shared",
            bf16=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        Dataset.from_list(rows),
        processing_class=tok,
        peft_config=lora,
    )


def update(axis: str, value: int) -> dict[str, float]: # Seconds by phase
    "The median of updates, the first left out."
    trainer = trainer_of(**BASE | {axis: value})
    steps = [timed_update(trainer, rows)[0] for rows in trainer.batches()][1:]
    return {phase: median(step[phase] for step in steps) for phase in steps[0]}


def log_entry(entries: int) -> dict[str, float]: # Milliseconds
    "What lines and diagnosis take for an entry, after so many."
    keys = "reward", "kl", "entropy", "rewards/true_reward/mean", "policy/clipfrac_avg", "completions/mean_length"
    log = [{"step": i, **{key: i + .5 for key in keys}} for i in range(entries + 200)]
    state = TrainerState(max_steps=2 * entries, is_world_process_zero=True, log_history=log[:entries])
    args, views = PPOConfig(report_to="none", bf16=False, use_cpu=True), [Lines(), Doctor()]
    with redirect_stderr(io.StringIO()):
        for view in views: view.on_train_begin(args, state, TrainerControl())
        for view in views: view.on_log(args, state, TrainerControl())
        start = time.perf_counter()
        for entry in log[entries:]:
            state.log_history.append(entry)
            for view in views: view.on_log(args, state, TrainerControl())
        return dict(entry=(time.perf_counter() - start) / 200 * 1000)


LOAD = """
import json, resource, sys, time
from rlhf_nb.config import DataArguments
from rlhf_nb.data import load_prompts
from rlhf_nb.testing import policy_tokenizer
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
tok, before, start = policy_tokenizer(), peak(), time.perf_counter()
load_prompts(DataArguments(train_file_dir=sys.argv[1]), tok, max_prompt_length=64)
print(json.dumps(dict(seconds=time.perf_counter() - start, more_gb=peak() - before)))
"""


def load(prompts: int) -> dict[str, float]: # Seconds, and memory beyond that of the imports
    "A data set of so many prompts, each of about 50 tokens, in a process of its own."
    rows = shipped_rows()
    with tempfile.TemporaryDirectory() as folder:
        with open(Path(folder)/"prompts.jsonl", "w", encoding="utf-8") as file:
            for i in range(prompts):
                text = rows[i % len(rows)]["instruction"]
                file.write(json.dumps(dict(prompt=f"{text} (number {i})"), ensure_ascii=False) + "\n")
        run = subprocess.run([sys.executable, "-c", LOAD, folder], capture_output=True, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def main(out: Path, axes: list[str]):
    "Every axis, saved one after the other."
    found = json.loads(out.read_text()) if out.exists() else {}
    measures = {axis: partial(update, axis) for axis in AXES} | dict(log=log_entry, load=load)
    values = AXES | dict(log=(100, 1_000, 10_000, 100_000), load=(1_000, 10_000, 100_000))
    for axis in axes or measures:
        found[axis] = {str(value): measures[axis](value) for value in values[axis]}
        print(axis, found[axis], flush=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__": main(Path(sys.argv[1]), sys.argv[2:])
