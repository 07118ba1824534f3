"""Does the critic pay? PPO beside RLOO and GRPO in two worlds, and one idea at a time: critic.py FOLDER OUT.json

A run that FOLDER already has is not made again, so several processes can share the work."""
import json
import os
from argparse import ArgumentParser
from itertools import accumulate
from pathlib import Path
from tempfile import mkdtemp

import torch
from datasets import Dataset
from learning import PHASES, course, optimizer_steps, peer, ppo, unseen
from peft import LoraConfig
from psutil import pid_exists
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from rlhf_nb.config import PPOConfig
from rlhf_nb.ppo import explained_variance
from rlhf_nb.sorting import RECIPE, sorted_right, sorting_policy, sorting_rows, true_values
from rlhf_nb.trainer import PPOTrainer

SEEDS = range(20, 25) # Settings were chosen with seeds 10 and 11
CLINIC_CRITIC = dict(
    batch_size=32, per_device_train_batch_size=16, max_steps=200, critic="adapter", lam=.95, critic_lam=1., vf_coef=1.,
    cliprange_value=None, use_score_scaling=True, use_score_norm=True, beta=.03, importance_sampling_level="sequence",
)

KNOWN: dict[tuple, tuple] = {} # Critics, by what their pretraining depends on


class Pretrained(PPOTrainer):
    "Learns the critic once for all runs of this process that would learn the same one."

    def pretrain_critic(self, signals):
        args, critic = self.args, self.policy.critic_parameters()
        key = (
            args.seed, args.critic, args.critic_pretraining_steps, args.generation_batch_size, args.vf_coef,
            args.critic_pretraining_learning_rate or (args.critic_learning_rate, args.learning_rate),
            args.lam if args.critic_lam is None else args.critic_lam, args.use_score_scaling, args.use_score_norm,
        )
        if known := KNOWN.get(key):
            weights, moments, states, random = known
            for p, weight, state in zip(critic, weights, states):
                p.data.copy_(weight)
                if state: self.optimizer.state[p] = {name: x.clone() for name, x in state.items()}
            vars(self.moments).update(moments)
            self.sampler.generator.set_state(random)
            return
        super().pretrain_critic(signals)
        states = [{name: x.clone() for name, x in self.optimizer.state.get(p, {}).items()} for p in critic]
        weights = [p.detach().clone() for p in critic]
        KNOWN[key] = weights, dict(vars(self.moments)), states, self.sampler.generator.get_state()


class Oracle(PPOTrainer):
    "The true values in place of the critic's."

    def step(self, rollout, scores):
        return super().step(rollout._replace(values=true_values(self, rollout)), scores)


class Gate(Pretrained):
    "The batch mean as baseline where the critic explains less than nothing (EVPO)."

    def step(self, rollout, scores):
        mask = rollout.tokens.response_mask
        to_go = scores.total[:, None].to(rollout.values) * mask
        if explained_variance(rollout.values, to_go, mask) < 0:
            rollout = rollout._replace(values=scores.total.mean() * mask)
        return super().step(rollout, scores)


class GroupMean(Pretrained):
    "A prompt's value is the mean of its other completions; the critic says how it changes (after AsyPPO)."

    def step(self, rollout, scores):
        n, groups = self.args.num_generations, scores.total.view(-1, self.args.num_generations)
        others = ((groups.sum(1, keepdim=True) - groups) / (n - 1)).view(-1, 1)
        values = (rollout.values - rollout.values[:, :1] + others) * rollout.tokens.response_mask
        return super().step(rollout._replace(values=values), scores)


class Signal(Pretrained):
    "Prompts whose completions are all right or all wrong are left out (DAPO)."

    def step(self, rollout, scores):
        groups = scores.total.view(-1, self.args.num_generations)
        alike = (groups == groups[:, :1]).all(1).repeat_interleave(self.args.num_generations)
        return super().step(rollout, scores._replace(total=scores.total.masked_fill(alike, float("nan"))))


class Imitate(Pretrained):
    "Right completions are learned from as answers, too; `ptx_coef` is the weight of their likelihood (VAPO)."

    def step(self, rollout, scores):
        right = rollout.tokens.response_mask * (scores.total > 0)[:, None]
        self.learner.supervised_answers = lambda rows, tok: (rollout.tokens.response_ids, right)
        return super().step(rollout, scores)


UNTAUGHT = dict(critic_pretraining_steps=0, critic_pretraining_learning_rate=None)
TOKEN = dict(importance_sampling_level="token")
# One idea at a time, in place of the recommended settings
IDEAS = {
    "as recommended": {},
    "no pretraining": UNTAUGHT,
    "critic_lam = lam": dict(critic_lam=None),
    "lam = 1": dict(lam=1.),
    "linear critic (detached)": dict(critic="detached"),
    "shared critic": dict(critic="shared"),
    "the policy's rate for the critic": dict(critic_learning_rate=None),
    "value clip 0.2": dict(cliprange_value=.2),
    "one ratio per token": TOKEN,
    "2 passes, twice the rate": dict(num_iterations=2, learning_rate=2e-3),
    "epsilon = 0.1": dict(epsilon=.1),
    "advantages not whitened": dict(normalize_advantages=False),
    "explained-variance gate, no pretraining": dict(trainer=Gate) | UNTAUGHT,
    "8 completions": dict(num_generations=8),
    "8 completions, group mean": dict(trainer=GroupMean, num_generations=8),
    "8 completions, none without signal": dict(trainer=Signal, num_generations=8),
    "epsilon_high = 0.28": dict(epsilon_high=.28),
    "right completions imitated, 0.1": dict(trainer=Imitate, ptx_coef=.1),
}


def whole(trainer):
    "A run that a signal has ended is none."
    if getattr(trainer, "stopped_by", 0): raise KeyboardInterrupt


def sorting(
    seed: int,
    trainer: type = Pretrained, # Ours, RLOOTrainer or GRPOTrainer
    updates: int = 60,          # Of 64 completions
    **settings,                 # In place of the recommended ones
) -> dict:
    "A run in the sorting world."
    mine = issubclass(trainer, PPOTrainer)
    steps = 1 if mine else optimizer_steps(settings)
    config = PPOConfig if mine else {RLOOTrainer: RLOOConfig, GRPOTrainer: GRPOConfig}[trainer]
    rows = sorting_rows(4000, seed=1)
    same = dict(output_dir=mkdtemp(), max_steps=updates * steps, per_device_train_batch_size=64,
                max_completion_length=14, temperature=1., beta=0., lr_scheduler_type="linear", logging_steps=steps,
                save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, seed=seed)
    made = trainer(
        AutoModelForCausalLM.from_pretrained(sorting_policy()),
        sorted_right,
        config(**same | (RECIPE if mine else dict(num_generations=8)) | settings),
        Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(sorting_policy()),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    made.remove_callback(PrinterCallback)
    made.train()
    whole(made)
    log = [entry for entry in made.state.log_history if "reward" in entry]
    seconds = [sum(entry[phase] for phase in PHASES) if mine else steps * entry["step_time"] for entry in log]
    return dict(rollouts=[64 * (i + 1) for i in range(len(log))], true_reward=[entry["reward"] for entry in log],
                seconds=[*accumulate(seconds)], explained=[entry.get("val/explained_variance") for entry in log])


def clinic(seed: int, name: str | None = None, **settings) -> dict:
    "A run in the clinic: of the peer `name`, or ours."
    if name:
        found, after = peer(name, mkdtemp(), seed, **settings)
        return found | dict(unseen=after)
    trainer = ppo(mkdtemp(), seed=seed, **settings)
    trainer.train()
    whole(trainer)
    return course(trainer) | dict(explained=trainer.history("val/explained_variance"), unseen=unseen(trainer)[-1])


PEERS = {"RLOO": RLOOTrainer, "GRPO": GRPOTrainer}
AS_OFTEN = dict(per_device_train_batch_size=32, steps_per_generation=2, num_iterations=4) # As PPO: 8 optimizer steps
BEST = {"RLOO": 4e-3, "GRPO": 4e-3, "RLOO, four passes": 2e-3, "GRPO, four passes": 1e-3} # By "rates"


def rival(name: str, rate: float | None = None, **settings) -> tuple: # How often, after a comma
    "A run of a peer in the sorting world."
    how = AS_OFTEN if "," in name else {}
    return sorting, dict(trainer=PEERS[name[:4]], learning_rate=rate or BEST[name]) | how | settings


RUNS = {
    "rates": {f"{name} {rate:g}": rival(name, rate, updates=30) for name in BEST
              for rate in (BEST[name] / 2, BEST[name], BEST[name] * 2)},
    "half": {"PPO": (sorting, dict(updates=30))} | {name: rival(name, updates=30) for name in BEST} | {
        "PPO, ratio per token": (sorting, dict(updates=30) | TOKEN),
        "PPO, no pretraining": (sorting, dict(updates=30) | UNTAUGHT),
        "PPO, oracle": (sorting, dict(updates=30, trainer=Oracle) | UNTAUGHT),
    },
    "sorting": {"PPO": (sorting, {})} | {name: rival(name) for name in PEERS},
    "ideas": {name: (sorting, dict(updates=20) | idea) for name, idea in IDEAS.items()},
    "clinic": {"PPO": (clinic, CLINIC_CRITIC), "demo": (clinic, {})} | {
        name: (clinic, dict(name=name, beta=.02)) for name in PEERS} | {
        "RLOO, two passes": (clinic, AS_OFTEN | dict(name="RLOO", beta=.02, learning_rate=2e-3, num_iterations=2)),
    },
}


def claim(file: Path) -> bool:
    "Is this run still to be made, and by no other process that is alive?"
    mark = file.with_suffix(".claim")
    if file.exists(): return False
    try: mark.open("x").close()
    except FileExistsError:
        owner = mark.read_text()
        if not owner or pid_exists(int(owner)): return False
    mark.write_text(str(os.getpid()))
    return True


def gather(folder: Path) -> dict:
    "Every run that is there, by world, name and seed; an entry per update, of `batch` completions."
    found: dict = {}
    for file in sorted(folder.glob("*.json")):
        run = json.loads(file.read_text())
        short = {key: [round(x, 3) for x in run[key]] for key in ("true_reward", "explained") if any(run.get(key, []))}
        short |= dict(batch=int(run["rollouts"][0]), seconds=round(run["seconds"][-1]), unseen=run.get("unseen"))
        found.setdefault(run["world"], {}).setdefault(run["name"], {})[run["seed"]] = short
    return found


def main():
    "What is missing, and everything in one file."
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--worlds", nargs="+", default=[*RUNS], choices=RUNS)
    parser.add_argument("--seeds", nargs="+", type=int)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for world in args.worlds:
        for seed in args.seeds or ((10, 11) if world == "rates" else SEEDS):
            for name, (run, settings) in RUNS[world].items():
                file = args.folder/f"{world}-{name}-{seed}.json"
                if not claim(file): continue
                found = run(seed, **settings)
                part = file.with_suffix(".part")
                part.write_text(json.dumps(dict(world=world, name=name, seed=seed) | found))
                part.rename(file)
                print(world, name, seed, f"{sum(found['true_reward'][-10:]) / 10:.3f}", flush=True)
    for mark in args.folder.glob("*.claim"):
        if not mark.with_suffix(".json").exists(): print("not finished:", mark.stem)
    args.out.write_text(json.dumps(gather(args.folder)))


if __name__ == "__main__": main()
