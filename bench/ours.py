"""Time our PPOTrainer; the last line is JSON: ours.py MODELS SHAPE [--steps 3] [--epochs N] [--dtype bfloat16]"""
import argparse
import json
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from models import SHAPES
from peak import peak_gb
from peft import LoraConfig
from phases import timed_update

from rlhf_nb.config import PPOConfig
from rlhf_nb.trainer import PPOTrainer


def trainer_of(models: Path, shape: str, epochs: int, updates: int, dtype: torch.dtype, out: str) -> PPOTrainer:
    "As in the README, with completions of full length."
    s = SHAPES[shape]
    return PPOTrainer(
        model=f"{models}/policy",
        reward_funcs=f"{models}/reward",
        args=PPOConfig(
            output_dir=out,
            per_device_train_batch_size=s["batch"] // s["minibatches"],
            steps_per_generation=s["minibatches"],
            num_iterations=epochs,
            max_steps=updates,
            learning_rate=1e-5,
            max_prompt_length=s["prompt"],
            max_completion_length=s["response"],
            min_completion_length=s["response"],
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_json(f"{models}/prompts.jsonl"),
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=.05),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", type=Path)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="passes over an update's completions; default: the shape's most")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    args = parser.parse_args()
    s, dtype = SHAPES[args.shape], getattr(torch, args.dtype)
    steps = []
    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(args.models, args.shape, args.epochs or s["epochs"][-1], args.steps, dtype, out)
        for rows in trainer.batches():
            seconds, metrics = timed_update(trainer, rows)
            assert metrics["completions/mean_length"] == s["response"]
            steps.append(seconds)
    seconds, used = [sum(step.values()) for step in steps], str(trainer.args.dtype).removeprefix("torch.")
    told = dict(steps=steps, seconds=seconds, peak_gb=peak_gb(), device=str(trainer.args.device), dtype=used)
    print(json.dumps(told))


if __name__ == "__main__": main()
