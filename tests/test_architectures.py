"""Every decoder that transformers builds from a configuration: the same numbers by all ways, or a line that refuses it.

By default one of each family; with --slow all.
"""
import pytest
import torch
from architectures import DECODERS, NOT_MERGED, REFUSED, ROUGH, VOCAB, WITHOUT_CACHE, decoder, small
from peft import LoraConfig
from test_kernels import needs_bf16
from torch import nn

from rlhf_nb.config import ModelArguments, PPOConfig
from rlhf_nb.kernels import fuse_layers
from rlhf_nb.memory import Device, plan
from rlhf_nb.models import (
    ActorCritic,
    Sampling,
    Tokens,
    add_adapter,
    has_router,
    load_policy,
    load_weights,
    merge,
    save_policy,
    with_adapter,
)
from rlhf_nb.rollout import Generation, generate_batches, score_batch
from rlhf_nb.testing import save_tiny

FAMILIES = dict(
    plain="llama qwen3 gpt2", sliding_window="gemma3_text", hybrid="qwen3_next lfm2", state_space="mamba2",
    experts="qwen3_moe llama4_text", multimodal="gemma4", no_cache="openai-gpt", own_cache="minimax",
    refused="bart xlnet",
)
QUICK = {name for names in FAMILIES.values() for name in names.split()}
SAMPLING = Sampling(1., 0, tuple(range(2, 60))) # Many tokens end a completion, so that some end early

each = pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS
])
both = pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])


def make(name: str, lora: bool) -> ActorCritic:
    args = PPOConfig("unused", bf16=False, use_cpu=True)
    return load_policy(decoder(name), args, None, LoraConfig(r=4, task_type="CAUSAL_LM") if lora else None)


def change(policy: ActorCritic):
    "Make an adapter have an effect."
    torch.manual_seed(0)
    for name, p in policy.lm.named_parameters():
        if p.requires_grad and "lora_" in name: nn.init.normal_(p, std=.05)


def sample(policy: ActorCritic) -> tuple[Tokens, dict]:
    "Completions of prompts of four lengths, some of which end early, and what is known of their tokens."
    source = torch.Generator().manual_seed(1)
    queries = [torch.randint(60, VOCAB, (n,), generator=source) for n in (3, 9, 6, 12)]
    uniforms = torch.rand(4, 10, generator=source)
    (_, query, made), = generate_batches(policy, queries, Generation(SAMPLING, 10, 3), uniforms)
    assert len({*made.mask.sum(1).tolist()}) > 1
    return Tokens(*query, made.ids, made.mask), score_batch(policy, query, made, SAMPLING, reference=True)


def alone(lm, tokens: Tokens) -> list[torch.Tensor]:
    "Log-probs by plain transformers, a row at a time."
    found = []
    for query, real, response, mask in zip(*tokens):
        query, response = query[real > 0], response[mask > 0]
        logits = lm(input_ids=torch.cat([query, response])[None]).logits[0, len(query) - 1:-1].float()
        found.append(logits.log_softmax(-1).gather(1, response[:, None])[:, 0])
    return found


def gradient(policy: ActorCritic, logprobs: torch.Tensor) -> torch.Tensor:
    policy.zero_grad()
    logprobs.sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.lm.parameters() if p.grad is not None])


@each
@both
def test_a_policy_of_every_architecture(name, lora, tmp_path):
    if name in REFUSED:
        with pytest.raises(ValueError, match="cannot be a policy: |must be a decoder"): make(name, lora)
        return
    policy = make(name, lora)
    assert (policy.cache_name is None) == (name in WITHOUT_CACHE)
    _, found = sample(policy)
    assert (found["ref_logprobs"] - found["logprobs"]).abs().max() < 1e-5, "the reference is the start"
    change(policy)
    tokens, found = sample(policy)
    mask = tokens.response_mask > 0
    assert (found["sampling_logprobs"] - found["logprobs"]).abs().max() < ROUGH.get(name, 1e-4)
    plain = alone(policy.lm, tokens)
    assert (torch.cat(plain) - found["logprobs"][mask]).abs().max() < 1e-4
    ours = gradient(policy, policy(tokens, SAMPLING).logprobs[mask])
    theirs = gradient(policy, torch.cat(alone(policy.lm, tokens)))
    assert (ours - theirs).norm() < 1e-3 * theirs.norm() and theirs.norm() > 0
    save_policy(policy, tmp_path/"saved")
    other = make(name, lora)
    load_weights(other, tmp_path/"saved")
    assert torch.equal(other(tokens, SAMPLING).logprobs[mask], policy(tokens, SAMPLING).logprobs[mask])
    if not lora: return
    fresh = with_adapter(decoder(name), str(tmp_path/"saved"))
    assert (torch.cat(alone(fresh, tokens)) - torch.cat(plain)).abs().max() < 1e-4
    if name in NOT_MERGED:
        with pytest.raises(ValueError, match="gives other logits than with its adapter"): merge(fresh)
    else: assert (torch.cat(alone(merge(fresh), tokens)) - torch.cat(plain)).abs().max() < 1e-3


@needs_bf16
@each
def test_fast_layers_in_bfloat16_are_as_exact_as_the_stock_ones(name):
    if name in REFUSED: pytest.skip("no policy")
    adapter = LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    ids = torch.randint(60, VOCAB, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def results(dtype: torch.dtype, fast: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        lm = add_adapter(decoder(name).to(dtype), adapter).eval()
        if fast: fuse_layers(lm)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logprobs = logits.double().log_softmax(-1)
        found = logprobs[:, :-1].gather(2, ids[:, 1:, None])[..., 0][mask[:, :-1] > 0]
        found.sum().backward()
        return [found.detach(), torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None]).double()]

    try: stock = results(torch.bfloat16, False)
    except RuntimeError as error: pytest.skip(f"transformers itself: {error}")
    exact = results(torch.float32, False)
    most = 5 if has_router(decoder(name)) else 2 # Rounding may choose another expert
    for what, a, b, c in zip(("log-probs", "gradient"), stock, results(torch.bfloat16, True), exact):
        own, ours = (a - c).norm(), (b - c).norm()
        assert ours < most * own, f"{what}: {ours:.3g}, stock {own:.3g}"


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny"))[1])


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("llama", "gpt2", "qwen3_moe") else pytest.mark.slow)
    for name in DECODERS
])
@both
def test_the_plan_of_every_architecture(name, lora, reward, tmp_path):
    if name in REFUSED: pytest.skip("refused as a policy")
    small(name).save_pretrained(tmp_path)
    models = ModelArguments(model_name_or_path=str(tmp_path), reward_model_name_or_path=reward, use_peft=lora)
    args = PPOConfig("unused", per_device_train_batch_size=2, max_prompt_length=8, max_completion_length=8)
    found = plan(models, args, Device("this machine", "cpu", 1e10, None, None, None, True))
    assert found.peak > 0 and 0 < found.parameters["trained"] <= found.parameters["policy"]
