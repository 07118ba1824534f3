"FSDP2 on two processes trains like one process; what it writes does not tell."
import shutil

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_cli import run, short
from test_ranks import flags, identical, same_run

from rlhf_nb.models import ActorCritic, load_weights, save_policy, trained_weights
from rlhf_nb.testing import tiny_policy

FSDP = dict(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")


LAYERWISE = """--critic adapter --ent_coef .01 --gradient_checkpointing --gather_for_generation False
    --rollout_batch_size 3"""
FULL = "--use_peft False --ptx_coef .1"


@pytest.mark.parametrize("more", [
    "", pytest.param(LAYERWISE, marks=pytest.mark.slow), pytest.param(FULL, marks=pytest.mark.slow)
], ids=["plain", "layer-by-layer", "full"])
def test_shards_train_like_one(tiny, together, tmp_path, more):
    together(*flags(tiny, tmp_path/"two", 4, *more.split()), env=FSDP)
    run(*flags(tiny, tmp_path/"one", 8, *more.split()))
    same_run(tmp_path/"one", tmp_path/"two")


@pytest.mark.slow
def test_a_run_goes_on_in_any_number_of_processes(tiny, together, tmp_path):
    def told(out, rows, last, *more):
        constant = "--lr_scheduler_type", "constant", "--max_steps", last, "--save_steps", last
        return flags(tiny, tmp_path/out, rows, *constant, *more)
    on = "--resume_from_checkpoint", True
    run(*told("all", 8, 6))
    said = together(*told("parts", 4, 2), env=FSDP)
    assert "FSDP2 on 2 processes" in said
    run(*told("parts", 8, 4, *on))
    together(*told("parts", 4, 6, *on), env=FSDP)
    same_run(tmp_path/"all", tmp_path/"parts", evaluated=(2, 4))


@pytest.mark.slow
def test_resumed_on_as_many_processes_it_is_exact(tiny, together, tmp_path):
    more = "--max_steps", 4, "--save_steps", 2
    together(*flags(tiny, tmp_path/"straight", 4, *more), env=FSDP)
    shutil.copytree(tmp_path/"straight"/"checkpoint-2", tmp_path/"parts"/"checkpoint-2")
    together(*flags(tiny, tmp_path/"parts", 4, *more, "--resume_from_checkpoint", True), env=FSDP)
    identical(tmp_path/"straight"/"checkpoint-4", tmp_path/"parts"/"checkpoint-4")


def test_no_prompt_is_lost_or_repeated_when_the_batch_changes(tiny, tmp_path):
    def prompts(out):
        files = sorted((tmp_path/out/"completions").glob("completions_*"))
        return [p for file in files for p in pd.read_parquet(file).prompt]
    run(*short(*tiny, tmp_path/"all", "--max_steps", 3, "--log_with", "none"))
    run(*short(*tiny, tmp_path/"parts", "--log_with", "none"))
    more = "--max_steps 4 --batch_size 2 --resume_from_checkpoint True --log_with none"
    run(*short(*tiny, tmp_path/"parts", *more.split()))
    assert len(prompts("all")) == 12 and prompts("parts") == prompts("all")


@pytest.mark.parametrize("layers", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]])
def test_an_adapter_of_the_embeddings_comes_back(tmp_path, layers):
    def made(layers, **config):
        return ActorCritic(get_peft_model(tiny_policy("llama", **config)[0], LoraConfig(target_modules=layers)))
    torch.manual_seed(0)
    old, new = (made(layers, tie_word_embeddings=False) for _ in range(2))
    save_policy(old, tmp_path, trained_weights(old))
    load_weights(new, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(old.parameters(), new.parameters()))
    save_policy(made(["v_proj"]), tmp_path)
    with pytest.raises(ValueError, match="it is of another model"): load_weights(new, tmp_path)
