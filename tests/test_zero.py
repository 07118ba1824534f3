"DeepSpeed's ZeRO on two processes trains like one process, where it is installed (pip install '.[deepspeed]')."
import shutil

import pytest
from safetensors.torch import load_file
from test_cli import run
from test_launch import surroundings
from test_ranks import flags, two_ranks
from test_shards import FSDP, same_run

pytest.importorskip("deepspeed")


def zero(stage, *flags, **kw): return two_ranks(*flags, **kw, DS_ACCELERATOR="cpu", **{k: v for k, v in surroundings(f"zero{stage}").items() if k.startswith("ACCELERATE")})


@pytest.mark.parametrize("more", [["--whiten_rewards"], ["--critic", "adapter", "--ent_coef", .01, "--gradient_checkpointing", "--rollout_batch_size", 3],
                                  ["--use_peft", False, "--ptx_coef", .1, "--max_grad_norm", .05]], ids=["plain", "checkpointing", "full"])
@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_like_one(tiny, tmp_path, stage, more):
    said = zero(stage, *flags(tiny, tmp_path/"two", 4, *more))
    assert f"ZeRO stage {stage} on 2 processes" in said
    run(*flags(tiny, tmp_path/"one", 8, *more))
    same_run(tmp_path/"one", tmp_path/"two")


def test_a_run_goes_on_in_any_layout(tiny, tmp_path):
    told = lambda out, rows, last, *more: flags(tiny, tmp_path/out, rows, "--lr_scheduler_type", "constant", "--weight_decay", .1, "--max_steps", last, "--save_steps", 2, *more)
    on = ["--resume_from_checkpoint", True]
    run(*told("all", 8, 10))
    run(*told("parts", 8, 2))
    zero(2, *told("parts", 4, 4, *on))
    two_ranks(*told("parts", 4, 6, *on), **FSDP)
    zero(3, *told("parts", 4, 8, *on))
    run(*told("parts", 8, 10, *on))
    same_run(tmp_path/"all", tmp_path/"parts")


@pytest.mark.parametrize("stage", [2, 3])
def test_resumed_on_as_many_processes_it_is_exact(tiny, tmp_path, stage):
    more = ["--use_peft", stage == 2, "--max_steps", 4, "--save_steps", 2]
    zero(stage, *flags(tiny, tmp_path/"straight", 4, *more))
    shutil.copytree(tmp_path/"straight"/"checkpoint-2", tmp_path/"parts"/"checkpoint-2")
    zero(stage, *flags(tiny, tmp_path/"parts", 4, *more, "--resume_from_checkpoint", True))
    for file in (tmp_path/"straight"/"checkpoint-4").rglob("*.safetensors"):
        x, y = load_file(file), load_file(tmp_path/"parts"/file.relative_to(tmp_path/"straight"))
        assert x.keys() == y.keys() and all(x[k].equal(y[k]) for k in x), file


@pytest.mark.parametrize("stage, more, said", [(2, ["--torch_dtype", "float16"], "torch_dtype=float16 does not go with ZeRO"), (3, ["--gather_for_generation", False], "gather_for_generation=False"),
                                               (2, ["--critic_warmup_steps", 1], "critic_warmup_steps does not go with ZeRO"), (2, ["--optim", "adamw_8bit"], "optim=adamw_8bit does not")])
def test_what_zero_cannot_do_is_said(tiny, tmp_path, stage, more, said):
    assert said in zero(stage, *flags(tiny, tmp_path/"two", 4, *more), status=2)
