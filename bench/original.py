"""What each habit of the original program does to a run in the clinic: original.py OUT.json [--seeds 5] [--steps 40]"""
import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
from learning import ppo, unseen
from torch import Tensor
from torch.nn import functional as F

from rlhf_nb.models import Sampling, Tokens, sampling_logits
from rlhf_nb.rollout import Generated, Rollout
from rlhf_nb.trainer import PPOTrainer

Habit = Callable[[PPOTrainer], None] # Changes a trainer


def nothing(trainer: PPOTrainer):
    "As it is here."


def half(trainer: PPOTrainer):
    "Half of the updates: batches of two, counted as two steps each."
    trainer.args.max_steps //= 2


def pads_read(trainer: PPOTrainer):
    "Every prompt is padded to max_prompt_length, and pads are attended to where log-probs and values are computed."
    usual, pad = trainer.sampler.columns, trainer.processing_class.pad_token_id
    def columns(tokens: Tokens, made: Generated) -> dict[str, Tensor]:
        missing = trainer.args.max_prompt_length - tokens.query_ids.shape[1]
        ids = F.pad(tokens.query_ids, (missing, 0), value=pad)
        return usual(tokens._replace(query_ids=ids, query_mask=torch.ones_like(ids)), made)
    trainer.sampler.columns = columns


def top_k(k: int) -> Habit:
    "Training completions are sampled from the k most likely tokens; what is learned from is the whole distribution."
    def restricted(logits: Tensor, sampling: Sampling, start: int = 0) -> Tensor:
        logits = sampling_logits(logits, sampling, start)
        return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)

    def habit(trainer: PPOTrainer):
        usual = trainer.rollout
        def rollout(prompts: list[dict], *generator: torch.Generator) -> Rollout: # None: of training
            if generator: return usual(prompts, *generator)
            with patch("rlhf_nb.rollout.sampling_logits", restricted): return usual(prompts)
        trainer.rollout = rollout
    return habit


def dropout_on(trainer: PPOTrainer):
    "LoRA's dropout is on wherever log-probs are computed."
    for name, module in trainer.policy.named_modules():
        if "lora_dropout" in name: module.train()


def wrapped(trainer: PPOTrainer):
    "The reward model reads the prompt as the policy does, template and all."
    usual = trainer.rewards.funcs[0]
    def reward(prompts: list[str], question: list[str], **batch) -> list[float]:
        return usual(prompts=prompts, question=prompts, **batch)
    trainer.rewards.funcs[0] = reward


def all_of_them(trainer: PPOTrainer):
    "With top-k 50."
    for habit in (pads_read, top_k(50), dropout_on, wrapped, half): habit(trainer)


HABITS = {
    "none": nothing,
    "half of the updates": half,
    "pads are read": pads_read,
    "top-k 50": top_k(50),
    "top-k 3": top_k(3),
    "LoRA dropout on": dropout_on,
    "reward model reads the template": wrapped,
    "all but top-k 3": all_of_them,
}


def run(habit: Habit, steps: int, seed: int) -> dict[str, float]:
    "What came of one run, on the unseen questions."
    with tempfile.TemporaryDirectory() as out:
        trainer = ppo(out, max_steps=steps, seed=seed, lr_scheduler_type="constant", log_completions=False)
        habit(trainer)
        trainer.train()
        return dict(true=unseen(trainer)[-1], scores=trainer.last("eval_reward"),
                    kl=trainer.last("eval_objective/kl"), tokens=trainer.last("eval_completions/mean_length"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    found = {}
    for name, habit in HABITS.items():
        runs = found[name] = [run(habit, args.steps, seed) for seed in range(args.seeds)]
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        means = "".join(f"{mean(r[key] for r in runs):8.3f}" for key in runs[0])
        true = [r["true"] for r in runs]
        print(f"{name:34}{means}   true from {min(true):.3f} to {max(true):.3f}", flush=True)
