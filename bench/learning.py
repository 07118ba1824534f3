"""Runs in the clinic, whose true reward is known: ours, controls that must learn nothing, TRL's trainers, best of n."""
import random
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from statistics import mean

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_nb.cli import demo_parser, make_trainer
from rlhf_nb.clinic import clinic, clinic_models, clinic_reward_model, true_reward
from rlhf_nb.config import PPOConfig
from rlhf_nb.distributed import make_strategy
from rlhf_nb.models import ActorCritic
from rlhf_nb.rollout import Sampler
from rlhf_nb.trainer import PPOTrainer

TRUE = "rewards/true_reward/mean"
PHASES = "time/rollout", "time/score", "time/step"
Course = dict[str, list[float]] # rollouts, seconds, true_reward; one entry per update


# Ours


def ppo(folder: str | Path,                                   # For what the run writes
        change: Callable[[Callable], Callable] | None = None, # Of the reward that PPO sees
        **settings,                                           # In place of the demo's
) -> PPOTrainer:
    "A trainer with the demo's settings, and some changed."
    quiet = dict(output_dir=str(folder), overwrite_output_dir=True, report_to="none", disable_tqdm=True)
    model_args, data_args, args, *_ = demo_parser().build(quiet | settings)
    trainer = make_trainer(model_args, data_args, args, true_reward)
    if change: trainer.rewards.funcs[0] = change(trainer.rewards.funcs[0])
    return trainer


def unseen(trainer: PPOTrainer) -> list[float]:
    "The true reward on the unseen questions, at each evaluation."
    return trainer.history(f"eval_{TRUE}")


def course(trainer: PPOTrainer) -> Course:
    "How the true reward of the training batches went; a rollout is counted for each completion."
    spent = zip(*map(trainer.history, PHASES))
    return dict(rollouts=trainer.history("episode"), seconds=[*accumulate(map(sum, spent))],
                true_reward=trainer.history(TRUE))


def smooth(course: Course, over: int = 10) -> Course: # Updates
    "The mean true reward of the last `over` updates, from the first time that there are as many."
    true = course["true_reward"]
    means = [mean(true[i:i + over]) for i in range(len(true) - over + 1)]
    return {k: v[over - 1:] for k, v in course.items()} | dict(true_reward=means)


def first_at(course: Course, level: float = .9) -> float: # Infinity: never
    "Rollouts until ten updates reach this true reward in the mean."
    even = smooth(course)
    for rollouts, reward in zip(even["rollouts"], even["true_reward"]):
        if reward >= level: return rollouts
    return float("inf")


# Controls that must learn nothing


def shuffled(reward: Callable) -> Callable:
    "The right scores for the wrong completions."
    rng = random.Random(0)
    def scores(**batch):
        right = reward(**batch)
        return rng.sample(right, len(right))
    return scores


def constant(reward: Callable) -> Callable:
    "The same for every completion."
    def scores(prompts, **batch): return [0.] * len(prompts)
    return scores


CONTROLS = dict(
    shuffled=dict(change=shuffled, kl_in_loss=True, kl_estimator="k3"),
    constant=dict(change=constant),
    still=dict(learning_rate=0., max_steps=5),
)


# Peers


PEERS = dict(RLOO=(RLOOTrainer, RLOOConfig, 4e-3), GRPO=(GRPOTrainer, GRPOConfig, 2e-3)) # The best of three rates


def optimizer_steps(settings: dict) -> int: # Of a peer; TRL counts them where we count updates
    "Of an update."
    return settings.get("num_iterations", 1) * settings.get("steps_per_generation", 1)


def peer(name: str,              # A key of `PEERS`
         folder: str | Path,     # For what the run writes
         seed: int = 0,
         **settings,             # In place of the demo's
) -> tuple[Course, float]:       # And the true reward on the unseen questions
    "A run of one of TRL's trainers: same policy, reward, prompts, adapter, temperature, schedule and completions."
    trainer_class, config_class, learning_rate = PEERS[name]
    model_args, _, args, *_ = demo_parser().build(dict(output_dir=str(folder)))
    steps = optimizer_steps(settings)
    same = dict(
        output_dir=str(folder),
        per_device_train_batch_size=args.generation_batch_size,
        max_steps=args.max_steps * steps,
        num_generations=8,
        max_completion_length=args.max_completion_length,
        temperature=args.temperature,
        beta=args.beta,
        reward_weights=args.reward_weights,
        learning_rate=learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=seed,
    )
    policy, reward = clinic_models()
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(policy),
        reward_funcs=[clinic_reward_model(reward), true_reward],
        args=config_class(**same | settings),
        train_dataset=Dataset.from_list(clinic()[0]),
        processing_class=AutoTokenizer.from_pretrained(policy),
        peft_config=LoraConfig(r=model_args.lora_r, lora_alpha=model_args.lora_alpha, target_modules="all-linear",
                               task_type="CAUSAL_LM"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if TRUE in entry]
    found = dict(rollouts=[args.generation_batch_size * (i + 1) for i in range(len(entries))],
                 seconds=[*accumulate(steps * entry["step_time"] for entry in entries)],
                 true_reward=[entry[TRUE] for entry in entries])
    return found, judge(trainer, args)


def judge(trainer: Trainer, args: PPOConfig) -> float: # The demo's settings
    "The true reward on the unseen questions, sampled as the demo samples."
    policy = ActorCritic(trainer.model)
    strategy = make_strategy(policy, trainer.accelerator, args)
    rows = clinic()[1]
    sampler = Sampler(policy, trainer.processing_class, args, strategy)
    rollout = sampler(rows, torch.Generator().manual_seed(args.seed + 1))
    return mean(true_reward(rollout.prompts, rollout.completions, [row["question"] for row in rows]))


def best_of(trainer: PPOTrainer, # With the policy as it was at the start
            n: int,              # Completions per question
) -> float:
    "The true reward of the completion that the reward model likes best, on the unseen questions."
    rows = [row for row in trainer.eval_dataset for _ in range(n)]
    scores = trainer.score(trainer.rollout(rows, torch.Generator().manual_seed(0)))
    favourite = scores.total.view(-1, n).argmax(1, keepdim=True)
    return scores.by_name["true_reward"].view(-1, n).gather(1, favourite).mean().item()
