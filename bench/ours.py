"""Time our PPOTrainer; the last line is JSON: ours.py MODELS SHAPE [--steps 3] [--dtype bfloat16] [--int8]"""
import argparse
import json
import tempfile
import time

import torch
from datasets import Dataset
from models import SHAPES
from peak import peak_gb

import rlhf_nb.rollout
from rlhf_nb.config import ModelArguments, PPOConfig
from rlhf_nb.models import load_policy, load_tokenizer, run_device
from rlhf_nb.rewards import load_reward_model
from rlhf_nb.trainer import PPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("models")
parser.add_argument("shape", choices=SHAPES)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--dtype", default="bfloat16")
parser.add_argument("--int8", action="store_true")
args = parser.parse_args()
s, device, dtype = SHAPES[args.shape], run_device(), getattr(torch, args.dtype)

model_args = ModelArguments(model_name_or_path=f"{args.models}/policy", lora_rank=8, lora_alpha=16, lora_dropout=.05)
tok = load_tokenizer(model_args.model_name_or_path, model_args)
policy = load_policy(model_args, dtype, device)
reward = load_reward_model(f"{args.models}/reward", ModelArguments(), dtype, device)
prompts = Dataset.from_json(f"{args.models}/prompts.jsonl")
with tempfile.TemporaryDirectory() as out:
    config = PPOConfig(output_dir=out, batch_size=s["batch"], mini_batch_size=s["batch"] // s["minibatches"], num_ppo_epochs=s["epochs"],
                       max_source_length=s["prompt"], max_target_length=s["response"], min_target_length=s["response"], learning_rate=1e-5,
                       max_steps=args.steps, rollout_int8=args.int8, torch_dtype=args.dtype, log_with="none", disable_tqdm=True, save_steps=0)
    trainer = PPOTrainer(policy, reward, config, prompts, processing_class=tok)

writing, generate = [0.], rlhf_nb.rollout.generate
def timed(*args, **kwargs):
    start = time.perf_counter()
    try: return generate(*args, **kwargs)
    finally: writing[0] += time.perf_counter() - start
rlhf_nb.rollout.generate = timed

steps = []
for rows in trainer.batches():
    writing[0] = 0.
    seen = trainer.timed_step(rows)
    assert seen["tokens/responses"] == s["response"]
    steps.append({"write": writing[0], "look": seen["time/rollout"] - writing[0], "reward": seen["time/score"], "update": seen["time/step"]})
print(json.dumps(dict(steps=steps, seconds=[sum(step.values()) for step in steps], peak_gb=peak_gb(), device=str(device), dtype=args.dtype)))
