"""Every kind of adapter that peft has: the same numbers by all ways, or a refusal in one line.

By default some of them; with --slow all.
"""
import pytest
import torch
from architectures import decoder, small
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from test_architectures import SAMPLING, alone, gradient, sample
from transformers import AutoModelForCausalLM

from rlhf_nb.config import PPOConfig
from rlhf_nb.models import Tokens, load_policy, load_weights, merge, merge_adapter, save_policy, with_adapter
from rlhf_nb.testing import policy_tokenizer, tiny_policy

LAYERS = ["q_proj", "v_proj", "down_proj"]
VARIANTS = dict(
    plain={}, dora=dict(use_dora=True), rslora=dict(use_rslora=True), pissa=dict(init_lora_weights="pissa"),
    pissa_niter=dict(init_lora_weights="pissa_niter_4"), olora=dict(init_lora_weights="olora"),
    orthogonal=dict(init_lora_weights="orthogonal"), gaussian=dict(init_lora_weights="gaussian"),
    random=dict(init_lora_weights=False), head_too=dict(modules_to_save=["lm_head"]),
    embeddings_too=dict(modules_to_save=["embed_tokens"]), norm_too=dict(modules_to_save=["norm"]),
    on_head=dict(target_modules=["q_proj", "lm_head"]), on_embeddings=dict(target_modules=["q_proj", "embed_tokens"]),
    tokens=dict(trainable_token_indices=[4, 5]), biases=dict(bias="all"),
    parameters=dict(target_parameters=["mlp.down_proj.weight"], target_modules=["q_proj"]),
    more_layers=dict(layer_replication=[(0, 1), (0, 2)]),
    ranks=dict(rank_pattern=dict(q_proj=8), alpha_pattern=dict(q_proj=4)),
)
SETTINGS = dict( # Of single kinds, beside the layers
    ADALORA=dict(total_step=10), VBLORA=dict(num_vectors=4, vector_length=8, topk=2), BOFT=dict(boft_block_size=4),
    OFT=dict(oft_block_size=4), FOURIERFT=dict(n_frequency=20), IA3=dict(feedforward_modules=["down_proj"]),
    LN_TUNING=dict(target_modules=["norm"]), C3A=dict(block_size=16), SHIRA=dict(r=4), ROAD=dict(group_size=16),
    WAVEFT=dict(n_frequency=20), TRAINABLE_TOKENS=dict(token_indices=[4, 5], target_modules=["embed_tokens"]),
    ADAPTION_PROMPT=dict(adapter_len=4, adapter_layers=2, target_modules=None),
)
BESIDE = dict( # Modules that are trained beside LoRA
    llama=["embed_tokens", "norm", "input_layernorm", "lm_head"], bloom=["word_embeddings", "ln_f", "input_layernorm"],
    gemma3=["embed_tokens", "norm"], gpt2=["wte", "ln_f"], qwen3=["q_norm", "embed_tokens"],
)
REFUSED = {
    "pissa_niter", "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "LILY", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
}
RANDOM = {"random", "more_layers", "C3A", "FOURIERFT", "UNILORA", "VBLORA"} # They start at random
NOT_MERGED = {"more_layers", "BEFT"}
NEEDS = dict(ADAMSS="sklearn")
QUICK = {*"plain dora pissa pissa_niter on_embeddings tokens IA3 LOHA VERA PREFIX_TUNING LILY".split()}
KINDS = [*VARIANTS, *(getattr(kind, "value", kind) for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind != "LORA")]


def config_of(name: str):
    if name in VARIANTS:
        return LoraConfig(**dict(r=4, target_modules=LAYERS, task_type="CAUSAL_LM") | VARIANTS[name])
    kind = PEFT_TYPE_TO_CONFIG_MAPPING[name]
    given = dict(task_type="CAUSAL_LM", target_modules=LAYERS, num_virtual_tokens=4) | SETTINGS.get(name, {})
    return kind(**{key: value for key, value in given.items() if key in kind.__dataclass_fields__})


def policy_with(name: str):
    torch.manual_seed(0)
    return load_policy(decoder("llama"), PPOConfig("unused", bf16=False, use_cpu=True), None, config_of(name))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in KINDS
])
def test_every_kind_of_adapter(name, tmp_path):
    if name in NEEDS: pytest.importorskip(NEEDS[name])
    if name in REFUSED:
        with pytest.raises(ValueError): policy_with(name)
        return
    policy, base = policy_with(name), decoder("llama")
    tokens, found = sample(policy)
    mask = tokens.response_mask > 0
    assert (found["ref_logprobs"] - found["logprobs"]).abs().max() < 1e-5
    start = found["ref_logprobs"][mask] if name in RANDOM else torch.cat(alone(base, tokens))
    assert (found["ref_logprobs"][mask] - start).abs().max() < 1e-4, "the reference is the model as it was before"
    with torch.no_grad():
        for p in policy.lm.parameters():
            if p.requires_grad: p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * .03)
        ref = policy(tokens, SAMPLING).logprobs[mask]
        with policy.as_reference(): assert (policy(tokens, SAMPLING).logprobs[mask] - start).abs().max() < 1e-4
        assert (policy(tokens, SAMPLING).logprobs[mask] - ref).abs().max() == 0
    tokens, found = sample(policy)
    mask = tokens.response_mask > 0
    assert (found["sampling_logprobs"] - found["logprobs"]).abs().max() < 1e-4
    plain = torch.cat(alone(policy.lm, tokens))
    assert (plain - found["logprobs"][mask]).abs().max() < 1e-4
    assert gradient(policy, policy(tokens, SAMPLING).logprobs[mask]).isfinite().all()
    save_policy(policy, tmp_path)
    other = policy_with(name)
    load_weights(other, tmp_path)
    assert (other(tokens, SAMPLING).logprobs[mask] - found["logprobs"][mask]).abs().max() < 1e-5
    fresh = with_adapter(decoder("llama"), str(tmp_path))
    assert (torch.cat(alone(fresh, tokens)) - plain).abs().max() < 1e-4
    if name in NOT_MERGED:
        with pytest.raises(ValueError): merge(fresh)
    else: assert (torch.cat(alone(merge(fresh), tokens)) - plain).abs().max() < 1e-3


TIED = dict(
    layers=dict(target_modules=["q_proj"]), on_head=dict(target_modules=["q_proj", "lm_head"]),
    on_embeddings=dict(target_modules=["q_proj", "embed_tokens"]), head_too=dict(modules_to_save=["lm_head"]),
    both=dict(target_modules=["embed_tokens", "lm_head"]), embeddings_too=dict(modules_to_save=["embed_tokens"]),
    both_too=dict(modules_to_save=["lm_head", "embed_tokens"]), tokens=dict(trainable_token_indices=[4, 5]),
    kept_tied=dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
)


@pytest.mark.parametrize("kind", TIED)
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3_text", marks=pytest.mark.slow)])
def test_embeddings_that_are_the_output_layer_too(name, kind, tmp_path):
    config = small(name)
    config.update(dict(tie_word_embeddings=True, vocab_size=len(tok := policy_tokenizer(size=290))))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path/"base")
    tok.save_pretrained(tmp_path/"base")
    adapter = LoraConfig(**dict(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]) | TIED[kind])
    policy = load_policy(str(tmp_path/"base"), PPOConfig("unused", bf16=False, use_cpu=True), None, adapter)
    with torch.no_grad():
        for p in policy.lm.parameters():
            if p.requires_grad: p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * .1)
    save_policy(policy, tmp_path/"adapter")
    ids = torch.tensor([tok("What now? I cough.").input_ids])
    want = policy.lm(input_ids=ids).logits
    if kind in ("on_head", "on_embeddings", "both"): # One weight would have to be two
        with pytest.raises(ValueError, match="gives other logits than with its adapter"):
            merge_adapter(str(tmp_path/"base"), str(tmp_path/"adapter"), str(tmp_path/"merged"))
        assert not (tmp_path/"merged").exists()
        return
    merge_adapter(str(tmp_path/"base"), str(tmp_path/"adapter"), str(tmp_path/"merged"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path/"merged")
    assert (merged(input_ids=ids).logits - want).abs().max() < 1e-4


@pytest.mark.parametrize("arch, name", [(arch, name) for arch, names in BESIDE.items() for name in names])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_modules_beside_lora_in_16_bits(arch, name, dtype):
    gpu = torch.cuda.is_available() # tests/gpu has this test, too
    if dtype == torch.float16 and not gpu: pytest.skip("a run in float16 needs a GPU")
    device = "cuda" if gpu else "cpu"
    args = PPOConfig("unused", bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16, use_cpu=not gpu)
    lm, _ = tiny_policy(arch)
    config = LoraConfig(r=4, task_type="CAUSAL_LM", modules_to_save=[name])
    policy = load_policy(lm.to(dtype).to(device), args, None, config)
    ids = torch.arange(5, 23, device=device).view(2, 9)
    tokens = Tokens(ids, torch.ones_like(ids), ids.flip(0), torch.ones_like(ids))
    with torch.autocast(device, dtype):
        found = policy(tokens, SAMPLING).logprobs
        with policy.as_reference(): assert (policy(tokens, SAMPLING).logprobs == found).all()
    found.sum().backward()
    grads = {n: p.grad for n, p in policy.lm.named_parameters() if p.requires_grad}
    assert any("modules_to_save" in n for n in grads) and {g.dtype for g in grads.values()} == {torch.float32}
    assert all(g.isfinite().all() for g in grads.values())
    exact = load_policy(tiny_policy(arch)[0].to(device), PPOConfig("unused", bf16=False, use_cpu=not gpu), None, config)
    assert (exact(tokens, SAMPLING).logprobs - found).abs().max() < .1
