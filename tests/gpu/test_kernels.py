"What a GPU computes in another way: float32 logits from 16-bit weights, and LoRA that is merged while sampling."
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rlhf_nb import kernels
from rlhf_nb.kernels import float32_logits, head_logprobs, packed_for_generation
from rlhf_nb.models import ActorCritic, Sampling
from rlhf_nb.testing import tiny_policy

from . import conftest


@pytest.mark.parametrize("dtype, rounded", [(torch.float16, .015), (torch.bfloat16, .1)])
def test_log_probs_of_large_logits_are_not_rounded(dtype, rounded, monkeypatch):
    supported = conftest.PRETENDED or torch.cuda.is_bf16_supported(including_emulation=False)
    if dtype == torch.bfloat16 and not supported: pytest.skip("needs a GPU that multiplies bfloat16")
    torch.manual_seed(0)
    head = nn.Linear(64, 1000, bias=False).to(dtype).cuda().requires_grad_(False)
    hidden = torch.randn(50, 64, device="cuda").to(dtype)
    hidden *= (65 / (hidden @ head.weight.T).float().abs().amax(-1, keepdim=True)).to(dtype)
    ids = (hidden @ head.weight.T).topk(20).indices[:, -1]
    early = torch.zeros(50, dtype=torch.bool, device="cuda")
    exact = (hidden.double() @ head.weight.T.double()).log_softmax(-1).gather(1, ids[:, None])[:, 0]

    def far() -> float:
        found, _ = head_logprobs(hidden, head, ids, early, Sampling())
        return (found.double() - exact).abs().max().item()
    assert far() < 1e-4
    monkeypatch.setattr(kernels, "has_float32_products", lambda *_: False)
    assert far() > rounded


def test_the_gradient_of_float32_logits():
    lm, _ = tiny_policy("llama")
    lm = lm.half().cuda().requires_grad_(False)
    hidden = torch.randn(2, 3, 64, device="cuda", requires_grad=True)
    with float32_logits(lm): logits = lm.lm_head(hidden)
    assert logits.dtype == torch.float32 and lm.lm_head(hidden.half()).dtype == torch.float16
    weights = torch.randn_like(logits)
    found, = torch.autograd.grad((logits * weights).sum(), hidden)
    wanted = weights @ lm.lm_head.weight.float()
    assert (found - wanted).abs().max() < .01 * wanted.abs().max()


@pytest.mark.parametrize("arch", ["llama", "bloom", "gpt2"])
def test_lora_is_merged_while_sampling(arch, monkeypatch):
    lm, _ = tiny_policy(arch)
    config = LoraConfig(r=4, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    policy = ActorCritic(get_peft_model(lm.half().cuda(), config))
    base = policy.lm.get_base_model()
    ids = torch.arange(5, 17, device="cuda")[None]
    before = {name: p.clone() for name, p in policy.named_parameters()}
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        plain = policy.lm(ids).logits
        with packed_for_generation(base, 1):
            merged = [m for m in base.modules() if "forward" in vars(m)]
            found = policy.lm(ids).logits
        monkeypatch.setattr(kernels, "MERGED_SHARE", 0.)
        with packed_for_generation(base, 1):
            few = [m for m in base.modules() if "forward" in vars(m) and kernels.mergeable(m)]
        assert torch.equal(policy.lm(ids).logits, plain)
    assert sum(map(kernels.mergeable, merged)) >= 6 * (arch != "gpt2") and not few
    assert any(isinstance(m, nn.LayerNorm) for m in merged) == (arch != "llama")
    assert (found - plain).abs().max() < .01 * plain.abs().max()
    assert all(torch.equal(p, before[name]) for name, p in policy.named_parameters())
    assert not any("forward" in vars(m) for m in base.modules())
    if arch != "gpt2": assert not torch.equal(found, plain), "another rounding"


def test_lora_is_not_merged_where_memory_does_not_suffice(monkeypatch, caplog):
    lm, _ = tiny_policy("llama")
    policy = ActorCritic(get_peft_model(lm.half().cuda(), LoraConfig(target_modules="all-linear")))
    base = policy.lm.get_base_model()

    def too_much(layer): raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(kernels, "merged_weight", too_much)
    caplog.set_level("INFO")
    with torch.no_grad(), torch.autocast("cuda", torch.float16), packed_for_generation(base, 1):
        assert not any("forward" in vars(m) for m in base.modules() if kernels.mergeable(m))
        assert policy.lm(torch.arange(5, 17, device="cuda")[None]).logits.isfinite().all()
    assert "not merged while sampling, for lack of memory" in caplog.text
