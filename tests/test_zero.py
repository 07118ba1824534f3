"DeepSpeed's ZeRO on two processes trains like one process, where it is installed (pip install '.[deepspeed]')."
import shutil

import pytest
from test_cli import run
from test_launch import surroundings
from test_ranks import flags, identical, same_run
from test_ranks import test_ranks_whose_rewards_differ_in_kind as same_as_one
from test_shards import FSDP

pytest.importorskip("deepspeed")


def environment(stage):
    found = surroundings(f"zero{stage}")
    return {k: v for k, v in found.items() if k.startswith("ACCELERATE")} | dict(DS_ACCELERATOR="cpu")


CHECKPOINTING = "--critic adapter --ent_coef .01 --gradient_checkpointing --rollout_batch_size 3"
FULL = "--use_peft False --ptx_coef .1 --max_grad_norm .05"


@pytest.mark.parametrize("more", ["--whiten_rewards", CHECKPOINTING, FULL], ids=["plain", "checkpointing", "full"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_like_one(tiny, together, tmp_path, stage, more):
    said = together(*flags(tiny, tmp_path/"two", 4, *more.split()), env=environment(stage))
    assert "DeepSpeed on 2 processes" in said
    run(*flags(tiny, tmp_path/"one", 8, *more.split()))
    same_run(tmp_path/"one", tmp_path/"two")


def test_a_run_goes_on_with_any_strategy(tiny, together, tmp_path):
    def told(out, rows, last, *more):
        settings = f"--lr_scheduler_type constant --weight_decay .1 --max_steps {last} --save_steps 2"
        return flags(tiny, tmp_path/out, rows, *settings.split(), *more)
    on = ["--resume_from_checkpoint", True]
    run(*told("all", 8, 10))
    run(*told("parts", 8, 2))
    together(*told("parts", 4, 4, *on), env=environment(2))
    together(*told("parts", 4, 6, *on), env=FSDP)
    together(*told("parts", 4, 8, *on), env=environment(3))
    run(*told("parts", 8, 10, *on))
    same_run(tmp_path/"all", tmp_path/"parts", evaluated=(2, 4, 6, 8))


@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_on_as_many_processes_it_is_exact(tiny, together, tmp_path, stage):
    more = ["--use_peft", stage == 2, "--max_steps", 4, "--save_steps", 2]
    together(*flags(tiny, tmp_path/"straight", 4, *more), env=environment(stage))
    shutil.copytree(tmp_path/"straight"/"checkpoint-2", tmp_path/"parts"/"checkpoint-2")
    together(*flags(tiny, tmp_path/"parts", 4, *more, "--resume_from_checkpoint", True), env=environment(stage))
    identical(tmp_path/"straight"/"checkpoint-4", tmp_path/"parts"/"checkpoint-4")


DROPPED = """
import math
import sys
from accelerate.state import PartialState
from datasets import Dataset
from rlhf_nb import PPOConfig, PPOTrainer
from rlhf_nb.testing import tiny_policy

def length(completions, **columns): return [float(len(c)) for c in completions]

args = PPOConfig(sys.argv[1], per_device_train_batch_size=int(sys.argv[2]), max_steps=9, num_iterations=2,
                 max_completion_length=6, learning_rate=.01, adam_epsilon=1e-3, target_kl=1e-30, bf16=False,
                 report_to="none", disable_tqdm=True)
policy, tok = tiny_policy(initializer_range=.2)
data = Dataset.from_dict(dict(prompt=["code a", "b", "c", "d"]))
trainer = PPOTrainer(policy, length, args, data, processing_class=tok)
seen = []
for what in ("plain", "stopped", "not finite", "plain"):
    args.early_stopping = what == "stopped"
    factor = math.nan if what == "not finite" and trainer.is_world_process_zero() else 1.
    hook = trainer.strategy.trained[0].register_hook(lambda grad: grad * factor)
    rollout = trainer.rollout(next(trainer.batches()))
    stats = trainer.step(rollout, trainer.score(rollout))
    hook.remove()
    seen += [stats[k] for k in ("policy/optimizer_steps", "loss/value_avg", "val/skipped_updates", "objective/kl")]
    seen.append(stats["grad_norm"] if what != "not finite" else 0.)
if trainer.is_world_process_zero(): print("SEEN", *seen)
PartialState().destroy_process_group()
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_dropped_gradients_do_not_come_back(together, tmp_path, stage):
    def seen(world, **env):
        said = together(tmp_path/str(world), 4 // world, world=world, code=DROPPED, env=env)
        return [float(x) for x in next(line for line in said.splitlines() if line.startswith("SEEN")).split()[1:]]
    one = seen(1)
    assert one[::5] == [2, 1, 0, 2] and one[2::5] == [0, 0, 1, 1]
    assert seen(2, **environment(stage)) == pytest.approx(one, rel=1e-4, abs=1e-5)


AUTO = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
SIZES = "reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"


@pytest.mark.parametrize("stage", [2, 3])
def test_a_configuration_of_deepspeeds_own(together, tmp_path, stage):
    auto = dict.fromkeys(AUTO, "auto") | dict(bf16=dict(enabled="auto"), fp16=dict(enabled="auto"))
    config = auto | dict(zero_optimization=dict.fromkeys(SIZES, "auto") | dict(stage=stage))
    same_as_one(together, tmp_path, "DeepSpeed", dict(deepspeed=config), DS_ACCELERATOR="cpu")


def test_what_zero_cannot_do_is_said(tiny, ranks, tmp_path):
    for stage, more, said in (
            (3, ["--gather_for_generation", False], "ds3_gather_for_generation=False does not go with ZeRO"),
            (2, ["--critic_warmup_steps", 1], "critic_warmup_steps does not go with ZeRO"),
            (2, ["--optim", "sgd"], "optim: SGD does not go with DeepSpeed: Adam, AdamW of torch do")):
        found = ranks(*flags(tiny, tmp_path/"two", 4, *more), env=environment(stage))
        assert 2 in found["status"] and 0 not in found["status"] and "".join(found["said"]).count(said) == 1
