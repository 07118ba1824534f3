"""What each habit of the original program does to a run in the clinic; five seeds each: original.py OUT.json [--seeds 5] [--steps 40]"""
import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_nb.models import sampling_logits
from rlhf_nb.rollout import Rollout
from rlhf_nb.trainer import PPOTrainer
from rlhf_nb.yardstick import ppo, unseen


def pads_read(trainer: PPOTrainer):
    "What is learned from was computed with every prompt padded to max_source_length, and pads that are attended to."
    rollout = trainer.rollout
    def look(*args, **kwargs) -> Rollout:
        found = rollout(*args, **kwargs)
        ids = F.pad(found.query_ids, (trainer.args.max_source_length - found.query_ids.shape[1], 0), value=trainer.processing_class.pad_token_id)
        read, mask = (ids, torch.ones_like(ids), found.response_ids, found.response_mask, trainer.sampling), found.response_mask
        with torch.no_grad():
            now = trainer.policy(*read, entropy=True)
            with trainer.policy.as_reference(): ref = trainer.policy(*read, values=False).logprobs
        return found._replace(query_ids=ids, query_mask=read[1], logprobs=now.logprobs * mask, ref_logprobs=ref * mask, values=now.values * mask, entropy=now.entropy * mask)
    trainer.rollout = look


def top_k(k: int) -> Callable[[PPOTrainer], None]:
    "Training answers are drawn from the k likeliest tokens; what is learned from is the whole distribution."
    def drawn(logits: Tensor, *args, **kwargs) -> Tensor:
        logits = sampling_logits(logits, *args, **kwargs)
        return logits.masked_fill(logits < logits.topk(k).values[..., -1:], -torch.inf)

    def cut(trainer: PPOTrainer):
        rollout = trainer.rollout
        def draw(prompts, generator=None, greedy=False) -> Rollout:
            if generator: return rollout(prompts, generator, greedy)
            with patch("rlhf_nb.rollout.sampling_logits", drawn): return rollout(prompts, generator, greedy)
        trainer.rollout = draw
    return cut


def dropout_on(trainer: PPOTrainer):
    "LoRA's dropout is on wherever log-probs are computed."
    for name, module in trainer.policy.named_modules():
        if "lora_dropout" in name: module.train()


def wrapped(trainer: PPOTrainer):
    "The reward model reads the prompt as the policy does, template and all."
    reward = trainer.rewards.funcs[0]
    trainer.rewards.funcs[0] = lambda prompts, question, **batch: reward(prompts=prompts, question=prompts, **batch)


def half(trainer: PPOTrainer):
    "Half of the updates: batches of two, counted as two steps each."
    trainer.args.max_steps = trainer.state.max_steps = trainer.args.max_steps // 2


def all_of_them(trainer: PPOTrainer):
    for habit in (pads_read, top_k(50), dropout_on, wrapped, half): habit(trainer)


HABITS = {"none": lambda trainer: None, "half of the updates": half, "pads are read": pads_read, "top-k 50": top_k(50), "top-k 3": top_k(3),
          "LoRA dropout on": dropout_on, "reward model reads the template": wrapped, "all but top-k 3": all_of_them}


def run(habit: Callable[[PPOTrainer], None], steps: int, seed: int) -> dict[str, float]:
    "What came of one run."
    with tempfile.TemporaryDirectory() as out:
        trainer = ppo(out, max_steps=steps, seed=seed, lr_scheduler_type="constant", log_completions=False)
        habit(trainer)
        trainer.train()
        return dict(true=unseen(trainer)[-1], scores=trainer.last("eval/scores"), kl=trainer.last("eval/kl"), tokens=trainer.last("eval/responses"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    found = {}
    for name, habit in HABITS.items():
        found[name] = [run(habit, args.steps, seed) for seed in range(args.seeds)]
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        true = [r["true"] for r in found[name]]
        print(f"{name:34}" + "".join(f"{mean(r[k] for r in found[name]):8.3f}" for k in found[name][0]) + f"   true from {min(true):.3f} to {max(true):.3f}", flush=True)
