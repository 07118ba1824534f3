"Fast paths against the plain computation: PyTorch's and peft's own layers, autograd, float64."
import io
from copy import deepcopy

import pytest
import torch
from architectures import small
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, DynamicCache, Gemma3nTextConfig, Qwen3Config
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.bloom.modeling_bloom import BloomAttention, build_alibi_tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from rlhf_nb import kernels
from rlhf_nb.kernels import (
    FusedLora,
    GrowingLayer,
    SdpaBloomAttention,
    StridedAttention,
    attention_bias,
    fuse_layers,
    grouped_attention,
    grow_in_blocks,
    head_is_plain,
    head_logprobs,
    packed_for_generation,
    packs,
    split_heads,
    token_entropy,
    token_logprobs,
)
from rlhf_nb.models import Sampling
from rlhf_nb.testing import DECODERS, tiny_policy, tiny_reward_model

BF16 = packs(torch.empty(0, dtype=torch.bfloat16))
needs_bf16 = pytest.mark.skipif(not BF16, reason="needs a CPU that multiplies bfloat16")


def rms(a, b): return (a.double() - b.double()).square().mean().sqrt().item()


def batch(tok):
    return tok(["Why?", "What helps against a cough?"], return_tensors="pt", padding=True)


def test_log_probs_and_entropy_have_the_gradient_of_autograd():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 6, 2], [3, 3, 1]])
    dist = torch.distributions.Categorical(logits=x)
    assert_close(token_logprobs(x, ids), dist.log_prob(ids))
    assert_close(token_entropy(x), dist.entropy())
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids), x)
    assert torch.autograd.gradcheck(token_entropy, x)


def test_log_probs_without_logits_are_of_the_type_that_autocast_has():
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 50, bias=False).requires_grad_(False), torch.randn(7, 16)
    ids, early = torch.randint(50, (7,)), torch.zeros(7, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        want = torch.distributions.Categorical(logits=head(hidden).float()).log_prob(ids)
        assert_close(head_logprobs(hidden, head, ids, early, Sampling())[0], want)


@pytest.mark.parametrize("chunk, block", [(50, 50), (150, 100), (10_000, 10_000)])
def test_log_probs_without_logits(monkeypatch, chunk, block):
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    monkeypatch.setattr(kernels, "BLOCK", block)
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 50).requires_grad_(False), torch.randn(7, 16)
    ids, early, sampling = torch.randint(50, (7,)), torch.arange(7) < 3, Sampling(.7, 3, (4, 9))
    ids[ids == 4] = 5

    def plain(h):
        ends = torch.isin(torch.arange(50), torch.tensor([4, 9]))
        dist = torch.distributions.Categorical(logits=(head(h) / .7).masked_fill(early[:, None] & ends, -1e9))
        return dist.log_prob(ids), dist.entropy()

    for pick in (lambda a, b: a.sum(), lambda a, b: b.sum(), lambda a, b: (a * b).sum()):
        results = []
        for f in (plain, lambda h: head_logprobs(h, head, ids, early, sampling, entropy=True)):
            h = hidden.clone().requires_grad_()
            out = f(h)
            results.append((*out, *torch.autograd.grad(pick(*out), h)))
        for a, b in zip(*results): assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_what_counts_as_a_plain_head():
    for arch in DECODERS: assert head_is_plain(tiny_policy(arch)[0].requires_grad_(False)), arch
    assert not head_is_plain(tiny_policy()[0])
    assert not head_is_plain(tiny_policy("gemma3", final_logit_softcapping=30.)[0].requires_grad_(False))


def test_attention_is_pytorchs():
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3 * 3 * 4, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    want = F.scaled_dot_product_attention(*split_heads(qkv, 3), attn_mask=bias, scale=.5)
    assert_close(kernels._Attention.apply(qkv, bias, .5, 3), want.transpose(1, 2).flatten(2))
    assert torch.autograd.gradcheck(lambda qkv: kernels._Attention.apply(qkv, bias, .5, 3), qkv)


MASKS = dict(
    none=lambda Q, N: None,
    padded=lambda Q, N: torch.ones(Q, N).tril(N - Q).bool().repeat(2, 1, 1, 1) & (torch.arange(N) > torch.tensor(
        [[[[-1]]], [[[0]]]])),
    added=lambda Q, N: torch.randn(2, 6, Q, N, dtype=torch.float64),
)


@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("queries", [7, 1])
def test_grouped_attention_is_sdpa(groups, mask, queries):
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups, module.is_causal = 6 // groups, True
    heads = (6, queries), (groups, 7), (groups, 7)
    given = [torch.randn(2, n, length, 4, dtype=torch.float64, requires_grad=True) for n, length in heads]
    mask = MASKS[mask](queries, 7)
    want, _ = sdpa_attention_forward(module, *given, mask, scaling=.3)
    found, _ = grouped_attention(module, *given, mask, scaling=.3)
    if mask is not None and mask.dtype == torch.bool and queries > 1: # The first query of a padded row sees nothing
        want, found = want[:, 1:], found[:, 1:]
    assert_close(found, want)
    loss = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad((x * loss).sum(), given) for x in (found, want))): assert_close(a, b)


def test_a_cache_has_room_that_attention_does_not_see():
    torch.manual_seed(0)
    layer, module = GrowingLayer(), nn.Module()
    new = [torch.randn(2, 6, 70, 4) for _ in range(2)]
    query = torch.randn(2, 6, 1, 4)
    assert layer.update(*new)[0].whole.shape[2] == 128
    want, _ = sdpa_attention_forward(module, query, *new, None)
    assert_close(grouped_attention(module, query, layer.keys, layer.values, None)[0], want)


def test_attention_of_many_tokens_with_dropout_or_a_learned_mask_is_left_to_sdpa(monkeypatch):
    asked = []
    monkeypatch.setattr(kernels, "sdpa_attention_forward", lambda *args, **kwargs: asked.append(args[1].device.type))
    x, long = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 300, 8)
    for q, mask, more in (
        (x, None, {}), (long, None, {}), (x, None, dict(dropout=.1)), (x, None, dict(softcap=1.)),
        (x, torch.zeros(1, 1, 4, 4, requires_grad=True), {}),
    ): grouped_attention(nn.Module(), q, q, q, mask, **more)
    assert asked == ["cpu"] * 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_only_sdpa_is_replaced(attention):
    model, tok = tiny_policy("llama")
    model.set_attn_implementation(attention)
    fuse_layers(model)
    assert model.config._attn_implementation == ("grouped" if attention == "sdpa" else "eager")
    assert "grouped" not in model.config.to_json_string()


@needs_bf16
@torch.no_grad()
def test_large_scores_are_not_rounded():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 40, 64, dtype=torch.float64) for n in (4, 2, 2))
    k += 20 * torch.randn(64, dtype=torch.float64) # As the bias of Qwen 2's keys
    module = nn.Module()
    module.num_key_value_groups = 2
    half = [x.bfloat16() for x in (q, k, v)]
    exact, _ = sdpa_attention_forward(module, *(x.double() for x in half), None, scaling=.125)
    errors = []
    for f in (sdpa_attention_forward, grouped_attention):
        for cast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=cast):
                errors.append(rms(f(module, *half, None, scaling=.125)[0], exact))
    assert max(errors) < 1.2 * min(errors), errors


def test_fast_layers_are_pickled_and_copied():
    model, tok = tiny_policy("qwen3")
    fuse_layers(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(**batch(tok)).logits, model(**batch(tok)).logits)


def test_what_a_user_hangs_on_an_activation_is_called():
    mlp = fuse_layers(Qwen3MLP(Qwen3Config(hidden_size=6, intermediate_size=10)))
    called = []
    mlp.act_fn.register_forward_hook(lambda *_: called.append(1))
    mlp(torch.randn(3, 6))
    assert called


def test_a_model_that_asks_for_sdpa_by_name_keeps_it():
    model = AutoModelForCausalLM.from_config(small("deepseek_v32"))
    assert fuse_layers(model).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma3RMSNorm, Olmo2RMSNorm, Qwen3RMSNorm, MistralRMSNorm])
def test_rms_norm_is_the_stock_one(kind):
    torch.manual_seed(0)
    stock = kind(12).requires_grad_(False)
    nn.init.normal_(stock.weight)
    fast = fuse_layers(deepcopy(stock))
    assert isinstance(fast, kernels.FusedRMSNorm) and isinstance(fast, kind)
    x = torch.randn(2, 5, 12, requires_grad=True)
    assert_close(fast(x), stock(x))
    with torch.no_grad(): assert torch.equal(fast(x), fast(x.detach()))
    fast.double().requires_grad_()
    def of_both(x, weight): return torch.func.functional_call(fast, dict(weight=weight), x)
    assert torch.autograd.gradcheck(of_both, (x.detach().double().requires_grad_(), fast.weight))
    assert type(fast(x).grad_fn).__name__ != "_RMSNormBackward", "the weight has another type: transformers' own"


@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu"])
def test_a_gated_mlp_is_the_stock_one(act):
    torch.manual_seed(0)
    stock = Qwen3MLP(Qwen3Config(hidden_size=6, intermediate_size=10, hidden_act=act)).double()
    fast = fuse_layers(deepcopy(stock))
    assert isinstance(fast, kernels.FusedGatedMLP)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert_close(fast(x), stock(x))
    assert torch.autograd.gradcheck(fast, x)
    used = "_Gated" in str(fast(x).grad_fn.next_functions)
    assert used is (act != "relu")


@torch.no_grad()
def test_bloom_is_the_stock_model():
    stock, tok = tiny_policy("bloom", initializer_range=.2)
    fused, inputs = fuse_layers(deepcopy(stock)), batch(tok)
    kinds = [type(model.transformer.h[0].self_attention) for model in (stock, fused)]
    assert kinds == [BloomAttention, SdpaBloomAttention]
    real = inputs.attention_mask[..., None] == 1
    assert_close(fused(**inputs).logits * real, stock(**inputs).logits * real, rtol=1e-5, atol=1e-4)
    if not BF16: return
    with torch.autocast("cpu", dtype=torch.bfloat16): half = fused(**inputs).logits # The mask is still float32
    assert half.isfinite().all() and rms(half * real, stock(**inputs).logits * real) < .1


@needs_bf16
def test_gelu_in_the_product_is_no_less_exact():
    torch.manual_seed(0)
    x, w, bias = torch.randn(256, 64).bfloat16(), (torch.randn(256, 64) / 4).bfloat16(), torch.randn(256).bfloat16()
    found = {}
    def plain(x): return F.gelu(F.linear(x, w.to(x.dtype), bias.to(x.dtype)), approximate="tanh")

    for name, f, kind in (("exact", plain, torch.float64), ("stock", plain, torch.bfloat16),
                          ("ours", lambda x: kernels._LinearGelu.apply(x, w, bias), torch.bfloat16)):
        seen = x.to(kind).requires_grad_()
        y = f(seen)
        found[name] = y.detach(), torch.autograd.grad(y.square().sum(), seen)[0]
    stock, ours = ([rms(a, b) for a, b in zip(found[name], found["exact"])] for name in ("stock", "ours"))
    assert ours[0] < stock[0] and ours[1] < 1.1 * stock[1]


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), pytest.param(torch.bfloat16, .01, marks=needs_bf16)])
def test_lora_is_pefts(dtype, close):
    torch.manual_seed(0)
    base = nn.Linear(64, 96, dtype=dtype).requires_grad_(False)
    lora = LoraLinear(base, "default", LoraConfig(), r=4, lora_alpha=8).eval()
    a, b = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    nn.init.normal_(b)
    for p in (a, b): p.data = p.data.to(torch.float32 if dtype == torch.bfloat16 else torch.float64)
    x, results = torch.randn(3, 7, 64, dtype=dtype), []
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        for kind in (LoraLinear, FusedLora):
            lora.__class__, seen = kind, x.clone().requires_grad_()
            out = lora(seen)
            results.append((out, *torch.autograd.grad(out.double().square().sum(), (seen, a, b))))
    for one, other in zip(*results):
        assert one.dtype == other.dtype
        assert rms(one, other) <= close * one.double().square().mean().sqrt()
    lora.float().base_layer.bias.requires_grad_(True)
    lora(torch.randn(3, 64)).sum().backward()
    assert_close(lora.base_layer.bias.grad, torch.full((96,), 3.))


def test_the_output_of_lora_may_be_changed_in_place():
    sliding, full = "sliding_attention", "full_attention"
    config = Gemma3nTextConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=[96] * 5, sliding_window=8, vocab_size_per_layer_input=300, hidden_size_per_layer_input=16,
        num_kv_shared_layers=2, laurel_rank=8, altup_num_inputs=2, activation_sparsity_pattern=[0.] * 5, pad_token_id=3,
        layer_types=[sliding, full, full, sliding, full])
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    lm = get_peft_model(AutoModelForCausalLM.from_config(config), lora)
    fuse_layers(lm.eval())(input_ids=torch.randint(5, 300, (2, 11))).logits.sum().backward()


@torch.no_grad()
@pytest.mark.parametrize("pos_att_type", [["p2c", "c2p"], ["c2p"], ["p2c"]])
@pytest.mark.parametrize("share_att_key", [True, False])
@pytest.mark.parametrize("n", [3, 200])
def test_deberta_is_the_stock_model(n, share_att_key, pos_att_type):
    stock, tok = tiny_reward_model(initializer_range=.2, pos_att_type=pos_att_type, share_att_key=share_att_key)
    fused = fuse_layers(deepcopy(stock))
    kinds = [{type(m) for m in model.modules()} for model in (stock, fused)]
    assert DisentangledSelfAttention in kinds[0] and StridedAttention in kinds[1] - kinds[0]
    assert DisentangledSelfAttention not in kinds[1]
    torch.manual_seed(0)
    ids, mask = torch.randint(5, len(tok), (2, n)), torch.ones(2, n, dtype=torch.long)
    mask[0, n // 2 + 1:] = 0
    logits = [model(input_ids=ids, attention_mask=mask).logits for model in (stock, fused)]
    assert_close(*logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bf16)])
def test_packed_weights_are_close_and_leave_nothing_behind(dtype):
    model, tok = tiny_policy("bloom", initializer_range=.2)
    lora = LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM")
    lm = fuse_layers(get_peft_model(model.to(dtype), lora).eval()).get_base_model()
    inputs = batch(tok)
    real = inputs.attention_mask[..., None] == 1
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        before = lm(**inputs).logits
        with packed_for_generation(lm, 2): inside = lm(**inputs).logits
        assert torch.equal(lm(**inputs).logits, before)
    error = rms(inside * real, before * real) / before.float().std()
    assert error < (.02 if dtype == torch.bfloat16 else 1e-5)
    assert not any("forward" in vars(m) or "up" in vars(m) for m in lm.modules())


@torch.no_grad()
@pytest.mark.parametrize("arch", DECODERS)
def test_a_cache_that_grows_in_blocks_is_transformers_cache(arch):
    model, tok = tiny_policy(arch, initializer_range=.2)
    torch.manual_seed(0)
    fuse_layers(model)
    ids, mask = torch.randint(4, len(tok), (3, 68)), torch.ones(3, 68, dtype=torch.long)
    mask[0, :2] = 0
    keep = torch.tensor([0, 2])
    results = []
    for change in (lambda cache: None, grow_in_blocks):
        cache = DynamicCache(config=model.config)
        model(ids[:, :62], attention_mask=mask[:, :62], past_key_values=cache)
        change(cache)
        cache.reorder_cache(keep)
        for n in range(63, 68):
            out = model(ids[keep, n - 1:n], attention_mask=mask[keep, :n], past_key_values=cache).logits
        results.append(out)
    assert_close(*results, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, most", [(torch.float16, 5e-4), (torch.bfloat16, 3e-3)])
def test_alibi_is_as_exact_as_16_bits_are_near_the_query(dtype, most):
    heads, n = 16, 512
    mask = torch.ones(2, n, dtype=torch.long)
    mask[1, :100] = 0
    causal = torch.zeros(2, 1, n, n).masked_fill(~torch.ones(n, n).tril().bool(), torch.finfo(torch.float32).min)
    causal = causal.masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    exact = build_alibi_tensor(mask, heads, torch.float64).view(2, heads, 1, n) + causal.double()
    for queries in (n, 1): # A whole text, and one more token
        qkv = torch.zeros(2, queries, 1, dtype=dtype)
        alibi = build_alibi_tensor(mask, heads, torch.float32)
        found = attention_bias(alibi, causal[:, :, -queries:], qkv, heads)
        assert found.dtype == dtype and attention_bias(alibi, None, qkv, heads) is found, "one for all layers"
        wanted = exact[:, :, -queries:].softmax(-1)
        rows = mask[:, None, -queries:, None] > 0
        far = ((found.double().softmax(-1) - wanted).abs().sum(-1, keepdim=True) * rows).max()
        assert far < most, far
        rounded = build_alibi_tensor(mask, heads, dtype).view(2, heads, 1, n).double()
        rounded = rounded + causal[:, :, -queries:].double()
        assert ((rounded.softmax(-1) - wanted).abs().sum(-1, keepdim=True) * rows).max() > 10 * most


def test_a_pass_of_bloom_makes_one_bias(monkeypatch):
    made = []
    monkeypatch.setattr(kernels, "attention_bias", lambda *given: made.append(attention_bias(*given)) or made[-1])
    model, tok = tiny_policy("bloom")
    fuse_layers(model)(**batch(tok))
    assert len(made) == 2 and made[0] is made[1]
    fuse_layers(model)(**batch(tok))
    assert made[2] is not made[0]
