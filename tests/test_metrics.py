"Every number that a run logs is in the registry, and the registry has nothing that no run logs."
import sys

import pytest
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig

from rlhf_nb.config import PPOConfig
from rlhf_nb.metrics import HEADLINES, METRICS, before_after, find_metric, series
from rlhf_nb.testing import tiny_policy
from rlhf_nb.trainer import PPOTrainer

sys.path.insert(0, str(ROOT/"docs"))
from metrics import metrics_table  # noqa: E402

ELSEWHERE = {"aux_loss", "policy/loss_scale"} # Of mixtures of experts and of float16 on a GPU


def true_reward(prompts, completions, **columns): return [float(len(c)) for c in completions]


def half(prompts, completions, **columns): return [None if i % 2 else 1. for i in range(len(completions))]


@pytest.fixture(scope="module")
def history(tmp_path_factory):
    "The log of a short run with evaluations of two sets."
    model, tokenizer = tiny_policy()
    data = Dataset.from_dict(dict(prompt=["a", "b", "c", "d"], output=["e", "f", "g", "h"]))
    args = PPOConfig(str(tmp_path_factory.mktemp("run")), per_device_train_batch_size=4, max_completion_length=4,
                     max_steps=2, logging_steps=1, ptx_coef=.1, eval_strategy="steps", eval_steps=1, save_strategy="no",
                     report_to="none", disable_tqdm=True)
    trainer = PPOTrainer(model, [true_reward, half], args, data, dict(first=data, second_set=data), tokenizer,
                         peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainer.train()
    return trainer.state.log_history


def test_what_a_run_logs_is_in_the_registry(history):
    logged = {key for entry in history for key in entry} - {"step"}
    assert [key for key in sorted(logged) if find_metric(key) is None] == []
    known = {key.replace("/half/", "/NAME/").replace("eval_first_", "eval_") for key in logged}
    assert {name for name in METRICS if name not in known} == ELSEWHERE
    seen = {name.removeprefix("eval_") for name in known if name.startswith("eval_") and "second_set" not in name}
    measured = {name for name, entry in METRICS.items() if entry.evaluated} | {"rewards/true_reward/std"}
    assert {name for name in seen if f"eval_{name}" not in METRICS} == measured


def test_keys_are_found():
    assert find_metric("eval_reward").label == find_metric("eval_my_set_reward").label == "eval reward"
    assert find_metric("rewards/a/b/mean").label == "reward a/b"
    assert find_metric("eval_math_runtime").name == "eval_runtime"
    assert find_metric("rewards/true_reward/mean").label == "true reward"
    for unknown in ("mine", "eval_mine", "rewards/mean", "rewards/x/max"): assert find_metric(unknown) is None


def test_every_entry_says_something():
    for entry in METRICS.values(): assert entry.label and entry.meaning and not entry.meaning.endswith("."), entry
    assert all(METRICS[key].healthy for key in HEADLINES)
    rows = [line for line in metrics_table().splitlines() if line.startswith("| `")]
    assert len(rows) == len(METRICS) and any(row.startswith("| `reward` |") for row in rows)


def test_before_and_after():
    rising = [{"step": i, "reward": i / 2, "objective/kl": i / 4} for i in range(1, 41)]
    assert before_after(rising) == {"reward": (1.25, 19.25), "objective/kl": (.625, 9.625)}
    assert before_after(rising, batches=False) == {}
    assert before_after([{"eval_reward": .3}, *rising, {"eval_reward": .5}])["reward"] == (.3, .5)
    assert series([{"reward": float("inf")}, {"reward": 1.}, {}], "reward") == [1.]
