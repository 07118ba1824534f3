"""Memory runs out: a run halves its passes and completes. And the plan's peak is the measured one."""
import gc
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaConfig

from rlhf_nb.memory import GPUS, TABLES, plan

from .runs import make, settings

LARGER = dict(save_steps=0, per_device_train_batch_size=16, steps_per_generation=1, max_steps=1, num_iterations=1)


def peak_of(work) -> tuple[int, int]: # Bytes before, and the most within
    "What some work needs."
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return before, torch.cuda.max_memory_allocated()


def allow(amount: float): # Bytes
    "From now on no more may be held."
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(amount / torch.cuda.get_device_properties(0).total_memory)


def needed(tiny, out, work, **given) -> int: # Bytes
    "What some work with a trainer needs, beyond what is held before."
    trainer = make(tiny, out, **given)
    before, most = peak_of(lambda: work(trainer))
    assert trainer.learner.limit == trainer.sampler.limit == math.inf
    return most - before


def prompts(trainer) -> list[dict]:
    return trainer.train_dataset.to_list()[:16]


# Not on a real GPU: its allocator rounds up to megabytes, more than these models need
@pytest.mark.pretended
def test_an_update_that_does_not_fit_is_made_in_halves(tiny, tmp_path):
    def made(trainer):
        rollout = trainer.rollout(prompts(trainer))
        return rollout, trainer.score(rollout)
    all_of_it = needed(tiny, tmp_path/"first", lambda trainer: trainer.step(*made(trainer)), **LARGER)
    trainer = make(tiny, tmp_path/"second", **LARGER)
    rollout, scores = made(trainer)
    held, _ = peak_of(lambda: None)
    allow(held + .7 * all_of_it)
    stats = trainer.step(rollout, scores)
    assert trainer.learner.limit in (2, 4, 8) and stats["policy/optimizer_steps"] == 1
    assert stats["val/skipped_updates"] == 0


@pytest.mark.pretended
def test_a_rollout_that_does_not_fit_is_made_in_halves(tiny, tmp_path):
    def sampled(trainer): return trainer.rollout(prompts(trainer), torch.Generator().manual_seed(0)).completions
    all_of_it = needed(tiny, tmp_path/"first", sampled, **LARGER)
    trainer = make(tiny, tmp_path/"second", **LARGER)
    expected = sampled(trainer)
    held, _ = peak_of(lambda: None)
    allow(held + .7 * all_of_it)
    assert sampled(trainer) == expected
    assert trainer.sampler.limit in (2, 4, 8)


@pytest.mark.slow
@pytest.mark.pretended
def test_a_run_that_does_not_fit_completes(tiny, tmp_path):
    all_of_it = needed(tiny, tmp_path/"first", lambda trainer: trainer.train(), **LARGER)
    trainer = make(tiny, tmp_path/"second", **LARGER)
    held, _ = peak_of(lambda: None)
    allow(held + .5 * all_of_it)
    trainer.train()
    assert trainer.state.global_step == 1 and trainer.last("val/skipped_updates") == 0
    assert min(trainer.learner.limit, trainer.sampler.limit) < 16


SHAPES = dict(
    bloom=lambda **ids: BloomConfig(hidden_size=256, n_layer=4, n_head=8, **ids),
    llama=lambda **ids: LlamaConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
                                    intermediate_size=768, max_position_embeddings=512, **ids),
)
PLANNED = dict(
    LoRA={},
    full=dict(use_peft=False),
    checkpointing=dict(gradient_checkpointing=True),
)


def save_larger(shape: str, folder, tiny):
    "A policy whose activations weigh more than what the program needs anyway."
    tok = AutoTokenizer.from_pretrained(tiny[0])
    ids = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    config = SHAPES[shape](vocab_size=8000, **ids)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)


QUICK = [("llama", "checkpointing")]


@pytest.mark.parametrize("shape, name", [
    pytest.param(shape, name, marks=() if (shape, name) in QUICK else pytest.mark.slow)
    for shape in SHAPES for name in PLANNED
])
def test_the_planned_peak_is_the_measured_one(tiny, tmp_path, shape, name):
    save_larger(shape, tmp_path/"policy", tiny)
    larger = tmp_path/"policy", tiny[1]
    lengths = dict(max_prompt_length=64, max_completion_length=64, min_completion_length=64, prompt_template="{}")
    given = lengths | dict(save_steps=0, per_device_train_batch_size=8, steps_per_generation=1, max_steps=2,
                           num_iterations=1) | PLANNED[name]
    model_args, _, args = settings(larger, tmp_path/"planned", **given)
    planned = plan(model_args, args, GPUS["T4"])
    parts = {phase: sum(n for part, n in held.items() if part != "program") for phase, held in planned.phases.items()}
    gc.collect()
    others = torch.cuda.memory_allocated()
    trainer = make(larger, tmp_path, **given)
    _, most = peak_of(trainer.train)
    ratio = max(parts.values()) / (most - others)
    assert abs(ratio - 1) < TABLES["tolerance"], f"planned / measured: {ratio:.2f}, {parts}, measured {most - others:,}"
