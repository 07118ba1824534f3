"Two processes with a batch of B train like one with a batch of 2B; each writes answers of its own."
import json

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from test_cli import history, run, short, untimed

SAME = set("""objective/kl kl reward reward_std rewards/reward/mean entropy objective/rlhf_reward objective/kl_coef
    policy/approxkl_avg loss/policy_avg loss/value_avg completions/clipped_ratio val/explained_variance grad_norm
    completions/mean_length policy/optimizer_steps episode num_tokens""".split())


def flags(tiny, out, rows, *more):
    settings = """--num_ppo_epochs 2 --max_steps 3 --save_steps 3 --adam_epsilon 1e-3 --do_eval --max_eval_samples 5
        --adap_kl_horizon 20 --target_kl .02 --early_stopping --log_with none"""
    return short(*tiny, out, "--batch_size", rows, "--mini_batch_size", rows // 2, *settings.split(), *more)


def entries(out): # By step and kind
    "The log, without times."
    def kind(e): return "eval" if "eval_reward" in e else "train" if "reward" in e else "end"
    return {(e["step"], kind(e)): untimed(e) for e in history(out)}


def same_run(one, two, evaluated=()):
    "Log, weights and completions of two runs agree; the second may have been evaluated after further steps."
    expected, found = entries(one), entries(two)
    assert found.keys() == expected.keys() | {(step, "eval") for step in evaluated}
    for key, entry in expected.items():
        assert found[key].keys() == entry.keys() and (key[1] != "train" or entry.keys() >= SAME)
        for name in entry.keys() - {"val/ratio_var"}: # The variance within a process's minibatch
            assert found[key][name] == pytest.approx(entry[name], rel=1e-4, abs=2e-5), name
    files = [p.relative_to(one) for p in one.rglob("*.safetensors") if "checkpoint" not in str(p)]
    assert len(files) >= 2
    for file in files:
        x, y = load_file(two/file), load_file(one/file)
        assert x.keys() == y.keys() and max((x[k] - y[k]).abs().max() for k in y) < 1e-5, file
    for file in sorted(one.glob("completions/*.parquet")):
        x, y = (pd.read_parquet(run/"completions"/file.name) for run in (two, one))
        assert x[["prompt", "completion", "length"]].equals(y[["prompt", "completion", "length"]]), file.name


def identical(one, two):
    "Every safetensors file of a folder is to be found in another, equal to the bit."
    for file in one.rglob("*.safetensors"):
        a, b = load_file(file), load_file(two/file.relative_to(one))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), file


VARIATIONS = """--whiten_rewards --use_score_scaling --critic adapter --critic_warmup_steps 1 --ent_coef .01
    --gradient_checkpointing --stop_strings e"""
FULL = "--use_peft False --kl_in_loss --kl_estimator k3 --ptx_coef .1 --reward_processes 1 --critic_pretraining_steps 2"


@pytest.mark.parametrize("more", [
    pytest.param("", id="plain", marks=pytest.mark.slow),
    pytest.param(VARIATIONS, id="variations"),
    pytest.param(FULL, id="full, one scores"),
])
def test_two_ranks_train_like_one(tiny, together, tmp_path, more):
    together(*flags(tiny, tmp_path/"two", 4, *more.split()))
    run(*flags(tiny, tmp_path/"one", 8, *more.split()))
    same_run(tmp_path/"one", tmp_path/"two")
    for name, n in (("completions_00001", 8), ("eval_00000", 5)):
        assert len(pd.read_parquet(tmp_path/"two"/"completions"/f"{name}.parquet")) == n


MIXED = """
import json
import sys
from accelerate.state import PartialState
from datasets import Dataset
from rlhf_nb import PPOConfig, PPOTrainer
from rlhf_nb.testing import tiny_policy

def mixed(prompts, completion_ids, **columns):
    return [[1.] * len(ids) if "code" in p else 3. for p, ids in zip(prompts, completion_ids)]

args = PPOConfig(sys.argv[1], per_device_train_batch_size=int(sys.argv[2]), max_steps=1, max_completion_length=6,
                 learning_rate=.01, bf16=False, report_to="none", disable_tqdm=True, **json.loads(sys.argv[3]))
policy, tok = tiny_policy()
data = Dataset.from_dict(dict(prompt=["code a", "b", "c", "d"]))
trainer = PPOTrainer(policy, mixed, args, data, data, processing_class=tok)
trainer.train()
entry = next(e for e in trainer.state.log_history if "reward" in e)
if trainer.is_world_process_zero(): print("RETURNS", [entry[n] for n in ("reward", "loss/value_avg", "grad_norm")])
print("WITH", type(trainer.strategy).__name__)
print("AFTER", trainer.evaluate()["eval_reward"])
PartialState().destroy_process_group()
"""


@pytest.mark.parametrize("kind, settings", [("Strategy", {}), ("FSDP2", dict(fsdp=True))])
def test_ranks_whose_rewards_differ_in_kind(together, tmp_path, kind, settings, **env):
    said = []
    for world, rows, more in ((2, 2, settings), (1, 4, {})):
        text = together(tmp_path/str(world), rows, json.dumps(more), world=world, code=MIXED, env=env)
        said.append(json.loads(next(line.split(maxsplit=1)[1] for line in text.splitlines() if "RETURNS" in line)))
        assert text.count("AFTER") == world and text.count(f"WITH {kind if world > 1 else 'Strategy'}") == world
    assert said[0] == pytest.approx(said[1], rel=1e-4)


ONE_SCORES = """
import os
import sys
import torch
from accelerate.state import PartialState
from datasets import Dataset
from rlhf_nb import PPOConfig, PPOTrainer, cli, files, rewards
from rlhf_nb.config import DataArguments, ModelArguments
from rlhf_nb.testing import tiny_policy

rank, (policy_path, reward_path, out) = int(os.environ["RANK"]), sys.argv[1:]
common = dict(output_dir=out, per_device_train_batch_size=2, max_completion_length=6, bf16=False, report_to="none",
              disable_tqdm=True)
called = []
def per_token(prompts, completions, completion_ids, **columns):
    called.extend(prompts)
    assert all(c[0]["role"] == "assistant" for c in completions)
    return [[i / 100 for i in ids] if p[-1]["content"] in "ad" else 3. for p, ids in zip(prompts, completion_ids)]
def sometimes(prompts, completions, topic, **columns):
    return [None if t in "be" else float(len(c[0]["content"])) for c, t in zip(completions, topic)]
def trips(prompts, completions, **columns):
    return [{"a": 1., "b": 2., "c": 3., "e": 4.}[p[-1]["content"]] for p in prompts]

data = Dataset.from_dict(dict(prompt=[[dict(role="user", content=t)] for t in "abcde"], topic=list("abcde")))
def make(funcs, processes, weights=None):
    args = PPOConfig(**common, max_steps=1, reward_processes=processes, reward_weights=weights)
    policy, tok = tiny_policy()
    tok.chat_template = "{% for m in messages %}{{m.content}}\\n{% endfor %}"
    return PPOTrainer(policy, funcs, args, data, data, processing_class=tok)
def scored(processes):
    trainer = make([per_token, sometimes, reward_path], processes, [1., .5, 2.])
    trainer.sampler.eos_token_ids = tuple(range(2, 1000, 9))
    if rank and processes: assert trainer.rewards.funcs[2] == reward_path and not called
    rollout = trainer.rollout(next(trainer.batches()))
    scores = trainer.score(rollout)
    return trainer.rewards.names, scores, trainer.evaluate(), trainer.step(rollout, trainer.score(rollout))

for names, scores, evaluated, stats in [scored(None)]: assert called
called.clear()
if rank: # From here on, nothing loads a reward model in the second process
    def forbidden(*args, **kwargs): raise AssertionError("a reward model was loaded")
    rewards.AutoModelForSequenceClassification.from_pretrained = forbidden
names1, scores1, evaluated1, stats1 = scored(1)
assert names1 == names == ["per_token", "sometimes", "reward"] and bool(called) == (not rank)
close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
close(scores1.total, scores.total); close(scores1.per_token, scores.per_token); close(scores1.by_name, scores.by_name)
untimed = lambda d: {k: v for k, v in d.items() if not k.endswith(("runtime", "per_second"))}
close(untimed(evaluated1), untimed(evaluated))
close(stats1, stats)
sys.stdout.write(f"PER TOKEN: {scores.per_token is not None}\\n")

trainer = make(trips, 1)
try: trainer.score(trainer.rollout([data[2 + rank]]))
except ValueError as e: sys.stdout.write(f"RANK {rank}: {e}\\n")

args = PPOConfig(**common, do_eval=True, reward_processes=1)
trainer = cli.make_trainer(ModelArguments(model_name_or_path=policy_path, reward_model_name_or_path=reward_path),
                           DataArguments(train_file_dir="data/finetune", max_eval_samples=3), args)
assert rank or files.about(trainer)["model"]["rewards"] == [reward_path]
assert trainer.evaluate()
PartialState().destroy_process_group()
"""


def test_one_of_two_processes_holds_the_rewards(tiny, together, tmp_path):
    text = together(*tiny, tmp_path/"out", code=ONE_SCORES)
    errors = sorted(line for line in text.splitlines() if line.startswith("RANK"))
    text_of = "Reward trips failed on the prompt [{'role': 'user', 'content': 'd'}]: KeyError: 'd'"
    assert errors == [f"RANK 0: {text_of}", f"RANK 1: {text_of}"]
    assert "PER TOKEN: True" in text
