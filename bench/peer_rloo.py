"""Time TRL's RLOOTrainer; the last line is JSON: peer_rloo.py MODELS SHAPE [--steps 2] [--epochs N] [--dtype bfloat16]

RLOO has no critic, and needs two completions of a prompt: half as many prompts make as many completions."""
import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

import torch
from datasets import Dataset
from found import on_gpu, wait
from models import SHAPES
from peak import peak_gb
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from rlhf_nb.rewards import load_reward_model


def prompts(models: Path, most: int) -> Dataset: # Most tokens of a prompt
    "The last tokens of each, as our trainer reads them."
    tok = AutoTokenizer.from_pretrained(f"{models}/policy")
    texts = [json.loads(line)["prompt"] for line in open(models/"prompts.jsonl", encoding="utf-8")]
    return Dataset.from_list([dict(prompt=tok.decode(tok(text).input_ids[-most:])) for text in texts])


def their_trainer(models: Path, shape: str, epochs: int, updates: int, dtype: torch.dtype, work: str) -> RLOOTrainer:
    "The same models, batch, lengths, learning rate and adapter as ours, and a KL penalty from it."
    s = SHAPES[shape]
    tok = AutoTokenizer.from_pretrained(f"{models}/policy", padding_side="left")
    device = torch.device("cuda" if on_gpu() else "cpu")
    trainer = RLOOTrainer(
        model=AutoModelForCausalLM.from_pretrained(f"{models}/policy", dtype=dtype),
        reward_funcs=load_reward_model(f"{models}/reward", dtype, device, batch_size=16),
        args=RLOOConfig(
            output_dir=mkdtemp(dir=work),
            per_device_train_batch_size=s["batch"] // s["minibatches"],
            steps_per_generation=s["minibatches"],
            num_generations=2,
            num_iterations=epochs,
            max_steps=s["minibatches"] * epochs * updates,
            learning_rate=1e-5,
            max_completion_length=s["response"],
            generation_kwargs=dict(min_new_tokens=s["response"]),
            beta=.05,
            gradient_checkpointing=False,
            fp16=dtype == torch.float16,
            bf16=dtype == torch.bfloat16,
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

    def seconds(self) -> list[float]:
        "Of each update."
        return [b - a for a, b in pairwise(self.times)]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    s = SHAPES[args.shape]
    epochs = args.epochs or s["epochs"][-1]
    with TemporaryDirectory() as work:
        trainer = their_trainer(args.models, args.shape, epochs, args.steps, getattr(torch, args.dtype), work)
        clock = Clock(s["minibatches"] * epochs)
        trainer.add_callback(clock)
        trainer.train()
    last = [entry for entry in trainer.state.log_history if "completions/mean_length" in entry][-1]
    assert last["completions/mean_length"] == s["response"]
    print(json.dumps(dict(seconds=clock.seconds(), peak_gb=peak_gb())))


if __name__ == "__main__": main()
