"What can be a policy: kinds of adapters, multimodal models, remote code; and what is refused in one line."
import json
import logging

import peft
import pytest
import torch
import transformers as hf
from peft import LoraConfig

from rlhf_nb.config import PPOConfig
from rlhf_nb.models import (
    REFERENCE,
    ActorCritic,
    Sampling,
    Tokens,
    load_policy,
    loading,
    router_coefficient,
    save_policy,
    unwrapped,
)
from rlhf_nb.testing import tiny_policy

TEXT = dict(vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=96, bos_token_id=1, eos_token_id=2, pad_token_id=3)
VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28,
              patch_size=14)
SMALL = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SAMPLING = Sampling(.7, 2, (2,))


def settings(**more): return PPOConfig("out", use_cpu=True, bf16=False, report_to="none", **more)


def lora(**more): return LoraConfig(r=4, task_type="CAUSAL_LM", **more)


def some_tokens():
    torch.manual_seed(0)
    query, response = torch.randint(5, 280, (2, 6)), torch.randint(5, 280, (2, 5))
    mask = torch.ones_like(query)
    mask[0, :3] = 0
    return Tokens(query, mask, response, torch.ones_like(response))


def distance(policy):
    "Largest gap between policy and reference."
    tokens = some_tokens()
    with torch.no_grad():
        now = policy(tokens, SAMPLING).logprobs
        with policy.as_reference(): return (now - policy(tokens, SAMPLING).logprobs).abs().max().item()


def check(policy):
    "It starts at its reference, padding changes nothing, the cache gives the same logits, and a gradient arrives."
    tokens = some_tokens()
    assert distance(policy) == 0
    now = policy(tokens, SAMPLING, entropy=True)
    alone = tokens.select(torch.tensor([0]))
    assert alone.query_mask.all() and alone.query_ids.shape == (1, 3)
    torch.testing.assert_close(policy(alone, SAMPLING).logprobs, now.logprobs[:1], rtol=0, atol=3e-5)
    (now.logprobs.sum() + now.entropy.sum()).backward()
    assert any(p.grad.any() for p in policy.lm.parameters() if p.grad is not None)
    ids = tokens.query_ids[1:]
    with torch.no_grad():
        cache = None
        for new, n in ((ids[:, :5], 5), (ids[:, 5:6], 6)):
            logits, cache = policy.next_logits(new, torch.ones(1, n, dtype=torch.long), cache)
        torch.testing.assert_close(logits[:, 0], policy.lm(input_ids=ids).logits[:, -1], rtol=0, atol=3e-5)


ADAPTERS = dict(
    gaussian=lora(init_lora_weights="gaussian"), random=lora(init_lora_weights=False),
    pissa=lora(init_lora_weights="pissa"), olora=lora(init_lora_weights="olora"),
    dora=lora(use_dora=True), rslora=lora(use_rslora=True),
    all_linear=lora(target_modules="all-linear", modules_to_save=["embed_tokens"]),
    head=lora(target_modules=["q_proj", "lm_head"]), parameters=lora(target_parameters=["mlp.down_proj.weight"]),
    tokens=lora(trainable_token_indices=[4, 5], target_modules=["q_proj"]),
    ia3=peft.IA3Config(task_type="CAUSAL_LM"), loha=peft.LoHaConfig(r=4, target_modules=["q_proj"]),
    lokr=peft.LoKrConfig(r=4, target_modules=["q_proj"]), vera=peft.VeraConfig(r=4, target_modules=["q_proj"]),
    oft=peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    adalora=peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_any_adapter_starts_at_its_reference(kind):
    policy = load_policy(hf.Qwen2ForCausalLM(hf.Qwen2Config(**TEXT)), settings(), peft_config=ADAPTERS[kind])
    assert REFERENCE in policy.lm.peft_config or kind not in ("random", "pissa", "olora")
    check(policy)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    again = load_policy(policy.lm, settings()) # A further trainer with the same model
    assert distance(again) == 0 and {name for name, p in again.named_parameters() if p.requires_grad} == trained
    if kind == "adalora": return # peft allows it one adapter that is trained
    critic = load_policy(policy.lm, settings(critic="adapter"))
    assert distance(critic) == 0
    torch.nn.init.normal_(critic.value_head.weight)
    critic.zero_grad()
    critic(some_tokens(), SAMPLING).values.sum().backward()
    reached = [name for name, p in critic.lm.named_parameters() if p.grad is not None and p.grad.any()]
    assert reached and all("critic" in name.split(".") for name in reached)


@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig])
def test_virtual_tokens_are_refused(kind):
    with pytest.raises(ValueError, match="virtual tokens are not supported"):
        load_policy(tiny_policy()[0], settings(), peft_config=kind(num_virtual_tokens=4, task_type="CAUSAL_LM"))


QWEN_VISION = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64,
                   fullatt_block_indexes=[0])
MULTIMODAL = dict(
    gemma3=(hf.Gemma3ForConditionalGeneration, lambda: hf.Gemma3Config(
        text_config=dict(head_dim=16, **TEXT), vision_config=VISION, mm_tokens_per_image=4)),
    qwen2_5_vl=(hf.Qwen2_5_VLForConditionalGeneration, lambda: hf.Qwen2_5_VLConfig(
        text_config=dict(rope_scaling=dict(type="mrope", mrope_section=[2, 2, 4]), **TEXT), vision_config=QWEN_VISION,
        image_token_id=290, video_token_id=291, vision_start_token_id=292, vision_end_token_id=293)),
    llava=(hf.LlavaForConditionalGeneration, lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**TEXT), vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=32))))


@pytest.mark.parametrize("kind", MULTIMODAL)
def test_only_text_of_a_multimodal_model(kind, tmp_path, caplog):
    auto, config = MULTIMODAL[kind]
    auto(config()).save_pretrained(tmp_path)
    for peft_config in (None, lora()):
        caplog.clear()
        with caplog.at_level(logging.INFO, "rlhf_nb"):
            policy = load_policy(str(tmp_path), settings(), peft_config=peft_config)
        told = [m for m in caplog.messages if "multimodal" in m]
        assert told == [f"{tmp_path} is multimodal ({kind}): only text is used"]
        check(policy)


@pytest.mark.parametrize("auto, config, text", [
    (hf.ViTForImageClassification, hf.ViTConfig(**VISION), "(vit) is not a causal language model"),
    (hf.BertForMaskedLM, hf.BertConfig(**SMALL), "(bert) is not a causal language model"),
    (hf.T5ForConditionalGeneration, hf.T5Config(d_model=32, d_kv=8, num_layers=1, num_heads=2, d_ff=32),
     "is an encoder-decoder (t5)")])
def test_what_is_no_decoder_is_refused(auto, config, text, tmp_path):
    model = auto(config)
    model.save_pretrained(tmp_path)
    for policy in (model, str(tmp_path)):
        with pytest.raises(ValueError) as e: load_policy(policy, settings())
        assert text in str(e.value) and "\n" not in str(e.value)


MOE = dict(mixtral=(hf.MixtralForCausalLM, hf.MixtralConfig(num_local_experts=4, **TEXT)),
           qwen3_moe=(hf.Qwen3MoeForCausalLM, hf.Qwen3MoeConfig(
               num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, **TEXT)))


@pytest.mark.parametrize("kind", MOE)
def test_the_load_balancing_loss_is_the_models_own(kind):
    auto, config = MOE[kind]
    for peft_config in (None, lora()):
        policy, tokens = load_policy(auto(config), settings(), peft_config=peft_config), some_tokens()
        check(policy)
        ids = torch.cat([tokens.query_ids, tokens.response_ids], 1)
        mask = torch.cat([tokens.query_mask, tokens.response_mask], 1)
        inputs = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        want = policy.lm(**inputs, output_router_logits=True).aux_loss
        torch.testing.assert_close(policy(tokens, SAMPLING, aux_loss=True).aux_loss, want)
        assert policy(tokens, SAMPLING).aux_loss is None
    assert router_coefficient(policy.lm, settings()) == config.router_aux_loss_coef > 0
    assert router_coefficient(policy.lm, settings(router_aux_loss_coef=0.)) == 0
    assert router_coefficient(tiny_policy()[0], settings()) == 0
    with pytest.raises(ValueError, match="bloom is not a mixture of experts"):
        router_coefficient(tiny_policy()[0], settings(router_aux_loss_coef=.1))


CODE = '''
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

class OwnForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model, self.lm_head = LlamaModel(config), nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_output_embeddings(self): return self.lm_head
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                         past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache)
        return CausalLMOutputWithPast(logits=self.lm_head(out[0]), past_key_values=out.past_key_values)
'''


def test_code_without_logits_to_keep(tmp_path):
    model = hf.LlamaForCausalLM(hf.LlamaConfig(tie_word_embeddings=False, **TEXT))
    model.save_pretrained(tmp_path)
    (tmp_path/"modeling_own.py").write_text(CODE)
    config = json.loads((tmp_path/"config.json").read_text())
    own = dict(architectures=["OwnForCausalLM"], auto_map=dict(AutoModelForCausalLM="modeling_own.OwnForCausalLM"))
    (tmp_path/"config.json").write_text(json.dumps(config | own))
    want = load_policy(model, settings())(some_tokens(), SAMPLING).logprobs
    for peft_config in (None, lora()):
        policy = load_policy(str(tmp_path), settings(trust_remote_code=True), peft_config=peft_config)
        assert type(unwrapped(policy.lm)).__name__ == "OwnForCausalLM"
        check(policy)
        torch.testing.assert_close(policy(some_tokens(), SAMPLING).logprobs, want)


def test_types_of_weights(tmp_path, caplog):
    tiny_policy("llama")[0].save_pretrained(tmp_path)
    half = settings(model_init_kwargs=dict(dtype="bfloat16", attn_implementation="eager"))
    with caplog.at_level(logging.INFO, "rlhf_nb"): full = load_policy(str(tmp_path), half)
    assert caplog.messages == ["Trained weights are kept in float32; they were loaded as bfloat16"]
    assert {p.dtype for p in full.parameters()} == {torch.float32} and full.lm.config._attn_implementation == "eager"
    adapted = load_policy(str(tmp_path), half, peft_config=lora())
    kinds = {(p.dtype, p.requires_grad) for p in adapted.lm.parameters()}
    assert kinds == {(torch.bfloat16, False), (torch.float32, True)}
    assert {p.dtype for p in load_policy(str(tmp_path), settings()).parameters()} == {torch.float32}
    model = tiny_policy("llama")[0].bfloat16()
    model.model.layers[0].requires_grad_(False)
    partly = load_policy(model, settings())
    assert partly(some_tokens(), SAMPLING).logprobs.isfinite().all()
    trained = [{p.requires_grad for p in layer.parameters()} for layer in partly.lm.model.layers]
    assert trained == [{False}, {True}]


def test_without_reference_nothing_is_copied(tmp_path):
    model = tiny_policy("llama")[0]
    assert load_policy(model, settings(beta=0.)).ref_lm is None and load_policy(model, settings()).ref_lm is not None
    random = load_policy(model, settings(beta=0.), peft_config=lora(init_lora_weights=False))
    assert list(random.lm.peft_config) == ["default"]


def test_settings_for_the_model():
    model = tiny_policy("gpt2", resid_pdrop=.3)[0]
    policy = load_policy(model, settings(disable_dropout=True))
    assert {m.p for m in policy.modules() if isinstance(m, torch.nn.Dropout)} == {0}
    assert load_policy(model, settings(sync_ref_model=True)).ref_lm is not None
    with pytest.raises(ValueError, match="sync_ref_model needs a copy of the model"):
        load_policy(model, settings(sync_ref_model=True), peft_config=lora())
    assert not load_policy(tiny_policy("gpt2")[0], settings()).train().lm.training


def test_a_value_head_next_to_a_named_model(tmp_path):
    policy = ActorCritic(tiny_policy("llama")[0])
    torch.nn.init.normal_(policy.value_head.weight)
    save_policy(policy, tmp_path)
    for source in (load_policy(str(tmp_path), settings()), ActorCritic(tiny_policy("llama")[0], source=tmp_path)):
        assert torch.equal(source.value_head.weight, policy.value_head.weight)


def test_an_error_without_words_is_named_by_its_kind():
    with pytest.raises(ValueError, match="model=x cannot be loaded: OSError"), loading("model", "x"): raise OSError
