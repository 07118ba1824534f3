"Numbers that float16 cannot hold: what overflows is computed in float32, and what is not finite is skipped and said."
import math

import pytest
import torch
from peft import LoraConfig
from test_rewards import ANSWERS, QUESTIONS, overflows

from rlhf_nb import learner
from rlhf_nb.config import PPOConfig
from rlhf_nb.models import Sampling, Tokens, load_policy
from rlhf_nb.rewards import RewardModel
from rlhf_nb.testing import policy_tokenizer, tiny_policy

from .runs import make


@pytest.fixture
def trainer(tiny, tmp_path): return make(tiny, tmp_path, max_steps=3, save_steps=0)


def weights(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.policy.parameters() if p.requires_grad]


def same(one: list, other: list) -> bool: return all(map(torch.equal, one, other))


def update(trainer) -> dict:
    "One update of the first prompts."
    rollout = trainer.rollout(trainer.train_dataset.to_list()[:4])
    return trainer.step(rollout, trainer.score(rollout))


def test_a_loss_that_is_not_finite_is_no_overflow_of_the_scale(trainer, monkeypatch, caplog):
    plain = learner.ppo_loss

    def lost(*positional, **named):
        loss, stats, ratios = plain(*positional, **named)
        return loss * math.nan, stats | dict(loss=loss * math.nan), ratios
    monkeypatch.setattr(learner, "ppo_loss", lost)
    before, scale = weights(trainer), trainer.accelerator.scaler.get_scale()
    stats = update(trainer)
    assert stats["val/skipped_updates"] == 1 and stats["policy/optimizer_steps"] == 0
    assert "Update 1 is skipped: the loss is not finite" in caplog.text
    assert trainer.accelerator.scaler.get_scale() == scale and same(before, weights(trainer))
    monkeypatch.setattr(learner, "ppo_loss", plain)
    assert update(trainer)["policy/optimizer_steps"] > 0 and not same(before, weights(trainer))


@pytest.mark.parametrize("max_grad_norm", [1., None])
def test_finite_gradients_of_infinite_norm_change_no_weight(tiny, tmp_path, max_grad_norm, caplog):
    trainer = make(tiny, tmp_path, max_steps=3, save_steps=0, max_grad_norm=max_grad_norm or 0.)
    before, scale = weights(trainer), trainer.accelerator.scaler.get_scale()
    trained = [p for p in trainer.policy.parameters() if p.requires_grad]
    hooks = [p.register_hook(lambda g: torch.full_like(g, 1e35)) for p in trained]
    stats = update(trainer)
    assert stats["val/skipped_updates"] == 1 and stats["policy/optimizer_steps"] == 0
    assert "Update 1 is skipped: the gradient is not finite" in caplog.text
    assert same(before, weights(trainer)) and trainer.accelerator.scaler.get_scale() == scale
    for hook in hooks: hook.remove()
    assert update(trainer)["policy/optimizer_steps"] > 0
    assert all(p.isfinite().all() for p in weights(trainer))


def test_the_scale_falls_for_an_overflow_and_rises_within_the_run(trainer):
    scaler = trainer.accelerator.scaler
    assert scaler.get_growth_interval() <= 200
    hooks = [p.register_hook(lambda g: g * math.inf) for p in trainer.policy.parameters() if p.requires_grad]
    scale = scaler.get_scale()
    stats = update(trainer)
    for hook in hooks: hook.remove()
    assert scaler.get_scale() < scale and stats["val/skipped_updates"] == 0


def large_sums(arch: str, dtype: torch.dtype) -> torch.nn.Module:
    "A model whose layers each add less than float16 can hold, and together more."
    lm, _ = tiny_policy(arch)
    stream = []
    if arch != "gemma3": lm.get_input_embeddings().weight.data.uniform_(-5e4, 5e4)
    for layer in lm.model.layers:
        layer.register_forward_hook(lambda m, _, out: stream.append(out.detach()))
        for norm in ("post_attention_layernorm", "post_feedforward_layernorm"):
            if arch == "gemma3": getattr(layer, norm).weight.data.fill_(1.5e4)
        if arch != "gemma3":
            for m in (layer.self_attn.o_proj, layer.mlp.down_proj): m.weight.data.uniform_(-2e4, 2e4)
    return lm.to(dtype).cuda(), stream


@pytest.mark.parametrize("arch", ["gemma3", "llama", "qwen3"])
def test_the_residual_stream_may_leave_the_range_of_float16(arch):
    def logprobs(dtype):
        lm, stream = large_sums(arch, dtype)
        args = PPOConfig("unused", fp16=dtype == torch.float16, bf16=False)
        policy = load_policy(lm, args, None, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
        ids = torch.arange(5, 29, device="cuda").view(2, 12)
        with torch.autocast("cuda", torch.float16, enabled=args.fp16):
            found = policy(Tokens(ids, torch.ones_like(ids), ids.flip(0), torch.ones_like(ids)), Sampling()).logprobs
        return found, max(x.abs().max().item() for x in stream)

    torch.manual_seed(0)
    exact, largest = logprobs(torch.float32)
    assert largest > torch.finfo(torch.float16).max
    torch.manual_seed(0)
    found, _ = logprobs(torch.float16)
    assert found.isfinite().all() and (found - exact).abs().max() < .1


def test_a_reward_model_that_overflows_goes_on_in_float32(caplog):
    tok = policy_tokenizer()
    reward = RewardModel(overflows(tok).half().cuda(), tok)
    exact = RewardModel(overflows(tok), tok)(QUESTIONS, ANSWERS)
    assert reward(QUESTIONS, ANSWERS) == pytest.approx(exact, rel=.01)
    assert "in float16: its weights are float32 from now on" in caplog.text
