"""Time our PPOTrainer; the last line is JSON: ours.py MODELS SHAPE [--steps 3] [--epochs N] [--dtype bfloat16]"""
import argparse
import json
import tempfile

from datasets import Dataset
from models import SHAPES
from peak import peak_gb
from peft import LoraConfig
from phases import timed_update

from rlhf_nb.config import PPOConfig
from rlhf_nb.trainer import PPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("models")
parser.add_argument("shape", choices=SHAPES)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
parser.add_argument("--epochs", type=int, help="passes over an update's completions; default: the shape's")
args = parser.parse_args()
s = SHAPES[args.shape]

with tempfile.TemporaryDirectory() as out:
    trainer = PPOTrainer(
        model=f"{args.models}/policy",
        reward_funcs=f"{args.models}/reward",
        args=PPOConfig(
            output_dir=out,
            per_device_train_batch_size=s["batch"] // s["minibatches"],
            steps_per_generation=s["minibatches"],
            num_iterations=args.epochs or s["epochs"][-1],
            max_steps=args.steps,
            learning_rate=1e-5,
            max_prompt_length=s["prompt"],
            max_completion_length=s["response"],
            min_completion_length=s["response"],
            bf16=args.dtype == "bfloat16",
            fp16=args.dtype == "float16",
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_json(f"{args.models}/prompts.jsonl"),
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=.05),
    )
steps = []
for rows in trainer.batches():
    seconds, metrics = timed_update(trainer, rows)
    assert metrics["completions/mean_length"] == s["response"]
    steps.append(seconds)
seconds = [sum(step.values()) for step in steps]
dtype = str(trainer.args.dtype).removeprefix("torch.")
print(json.dumps(dict(steps=steps, seconds=seconds, peak_gb=peak_gb(), device=str(trainer.args.device), dtype=dtype)))
