"""A checkpoint of every family: resumed at update 1, the run ends as one that was not stopped."""
import pytest
import torch
from architectures import decoder
from datasets import Dataset
from kit import length
from peft import LoraConfig

from rlhf_nb.config import PPOConfig
from rlhf_nb.testing import policy_tokenizer
from rlhf_nb.trainer import PPOTrainer

pytestmark = pytest.mark.slow

NAMES = "llama gpt2 gemma3_text qwen3_next mamba2 jamba mixtral bloom falcon_h1 gemma4 qwen3_moe lfm2 opt minimax git"
TOKENIZER = policy_tokenizer(size=290)


def make(name, lora, out, **more):
    prompts = Dataset.from_dict(dict(prompt=[f"What about {i}?" for i in range(8)]))
    given = dict(per_device_train_batch_size=2, gradient_accumulation_steps=2, num_iterations=2, max_steps=2,
                 max_completion_length=8, learning_rate=1e-2, lr_scheduler_type="constant", save_steps=1,
                 report_to="none", disable_tqdm=True, bf16=False, use_cpu=True, beta=.1) | more
    config = LoraConfig(r=4, task_type="CAUSAL_LM") if lora else None
    return PPOTrainer(decoder(name), length, PPOConfig(str(out), **given), prompts, processing_class=TOKENIZER,
                      peft_config=config)


def state(trainer): return {n: p.detach().clone() for n, p in trainer.policy.state_dict().items()}


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("name", NAMES.split())
def test_a_resumed_run_ends_as_one_that_was_not(name, lora, tmp_path):
    trainer = make(name, lora, tmp_path/"run")
    start = state(trainer)
    trainer.train()
    end = state(trainer)
    assert any(not torch.equal(start[n], x) for n, x in end.items())
    again = make(name, lora, tmp_path/"run")
    again.train(resume_from_checkpoint=str(tmp_path/"run"/"checkpoint-1"))
    found = state(again)
    assert found.keys() == end.keys() and again.state.global_step == 2
    far = {n: (found[n].float() - x.float()).abs().max().item() for n, x in end.items() if not torch.equal(found[n], x)}
    assert not far
    assert again.history("objective/kl") == trainer.history("objective/kl")
