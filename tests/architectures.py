"""A small random model of every architecture that transformers knows, from its configuration class.

python tests/architectures.py [NAME ...] builds them, runs each once, and says what came of it.
"""
import inspect
import sys
import time
import warnings

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

VOCAB = 300
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
LAYERS, HIDDEN, HEADS, SIZE, MLP, EXPERTS, WINDOW, LENGTH = 2, 64, 4, 16, 96, 4, 8, 256

SMALL = {name: value for names, value in {
    "vocab_size": VOCAB,
    "hidden_size n_embd d_model n_embed embedding_size emb_dim dim word_embed_proj_dim d_embed attention_hidden_size"
    " d_inner_model linear_attn_hidden_size lru_width": HIDDEN,
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"
    " num_decoder_layers": LAYERS,
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads": HEADS,
    "num_key_value_heads swa_num_key_value_heads num_kv_heads": 2,
    "head_dim kv_channels qk_nope_head_dim v_head_dim d_kv attention_head_dim swa_head_dim swa_v_head_dim"
    " linear_key_head_dim linear_value_head_dim": SIZE,
    "intermediate_size ffn_hidden_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner ffn_dim_inner"
    " ffn_intermediate_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size dff": MLP,
    "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size moe_ffn_hidden_size"
    " moe_shared_expert_intermediate_size": 32,
    "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts moe_n_routed_experts": EXPERTS,
    "num_experts_per_tok num_experts_per_token moe_k moe_topk num_experts_topk top_k_experts": 2,
    "n_group topk_group num_expert_group n_shared_experts num_shared_experts": 1,
    "first_k_dense_replace num_dense_layers": 1,
    "sliding_window attention_chunk_size attention_window_size local_attention": WINDOW,
    "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length": LENGTH,
    "q_lora_rank kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "type_vocab_size": 2,
    "index_n_heads": 2, "index_head_dim": SIZE, "index_topk": 64,
    "linear_num_key_heads linear_num_value_heads": 2,
    "hidden_dropout attention_dropout resid_pdrop embd_pdrop attn_pdrop hidden_dropout_prob activation_dropout dropout"
    " attention_probs_dropout_prob classifier_dropout resid_dropout layerdrop encoder_layerdrop decoder_layerdrop"
    " residual_dropout expert_dropout router_jitter_noise input_jitter_noise": 0.,
    "initializer_range init_std": .2,
    "image_size": 16, "patch_size": 8, "depth encoder_depth": LAYERS, "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input laurel_rank ple_embed_dim": 8, "num_kv_shared_layers": 0, "altup_num_inputs": 2,
    "output_dim projection_dim vision_hidden_size out_hidden_size": HIDDEN,
    "num_mel_bins input_size": SIZE,
}.items() for name in names.split()}


def fields(kind: type[PretrainedConfig]) -> set[str]:
    "The names that a configuration takes."
    return {*kind.__dataclass_fields__} | {*inspect.signature(kind.__init__).parameters}


def small(name: str, **more) -> PretrainedConfig:
    "A configuration of the smallest shape."
    return shrink(CONFIG_MAPPING[name], **OWN.get(name, {}) | more)


def shrink(kind: type[PretrainedConfig], **own) -> PretrainedConfig:
    "A configuration of a class, with all of its parts."
    known = fields(kind)
    given = {name: value for name, value in (SMALL | IDS).items() if name in known}
    if "qk_rope_head_dim" in known: # Multi-head latent attention: all heads have keys, rotated ones of this size
        given |= dict(num_key_value_heads=HEADS, head_dim=8)
    given = {name: value for name, value in given.items() if name in known}
    for part in kind.sub_configs:
        inner = type(getattr(kind(), part)) # Where the class names any, the default one
        if inner is not type(None): given[part] = shrink(inner, **own.pop(part, {}))
    return kind(**given | own)


HYBRID = dict(layer_types=["linear_attention", "full_attention"])
INDEXED = HYBRID | dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=SIZE, indexer_budget=64,
                        indexer_compress_ratio=4, ngram_vocab_size_base=500, hc_lowrank=8, heads_per_ngram=2,
                        split_ngram_parts=1)
SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
MAMBA = dict(mamba_d_state=8, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=8)
DECODER = dict(is_decoder=True)
OWN: dict[str, dict] = dict.fromkeys("""bert bert-generation big_bird camembert data2vec-text electra ernie
    megatron-bert rembert roberta roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl""".split(), DECODER) | dict(
    bailing_hybrid=HYBRID,
    bamba=dict(attn_layer_indices=[1], **MAMBA),
    cohere_compass_text=SLIDING | dict(rope_parameters=dict(
        full_attention=dict(rope_type="default", rope_theta=1e4),
        sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    codegen=dict(rotary_dim=8),
    cpmant=dict(dim_head=SIZE, dim_ff=MLP, prompt_types=2, prompt_length=2, segment_types=2),
    dbrx=dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.)),
    esmc=dict(num_key_value_heads=HEADS),
    layoutlmv3=dict(visual_embed=False, coordinate_size=10, shape_size=12),
    lilt=dict(hidden_size=96),
    longformer=dict(attention_window=8),
    luke=dict(entity_vocab_size=10, entity_emb_size=SIZE),
    t5=dict(decoder_start_token_id=0),
    falcon_h1=dict(mamba_d_ssm=128, **MAMBA),
    gemma3n_text=SLIDING | dict(activation_sparsity_pattern=[0., 0.], intermediate_size=[MLP] * 2),
    gemma4_text=SLIDING,
    gemma4_unified_text=SLIDING,
    gptj=dict(rotary_dim=8),
    granitemoehybrid=dict(layer_types=["mamba", "attention"], **MAMBA),
    jamba=dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8),
    kimi_linear=HYBRID | dict(linear_head_dim=SIZE, linear_num_heads=2),
    lfm2=dict(layer_types=["conv", "full_attention"]),
    lfm2_moe=dict(layer_types=["conv", "full_attention"]),
    lfm3=dict(layer_types=["conv", "full_attention"]),
    longcat_flash=dict(num_layers=1, zero_expert_num=2),
    mamba2=dict(num_heads=8, head_dim=SIZE, state_size=8, n_groups=1, chunk_size=8),
    mpt=dict(attn_config=dict(attn_pdrop=0)),
    qwen3_next=HYBRID, qwen3_5_text=HYBRID, qwen3_5_moe_text=HYBRID,
    qwen3_5=dict(text_config=HYBRID), qwen3_5_moe=dict(text_config=HYBRID),
    qwen4_exp_text=INDEXED,
    recurrent_gemma=dict(block_types=["recurrent", "attention"], num_hidden_layers=2),
    gpt_neo=dict(attention_types=[[["global", "local"], 1]]),
    minicpm3=dict(dim_model_base=HIDDEN),
    xlstm=dict(embedding_dim=HIDDEN, num_blocks=2, qk_dim_factor=1., chunk_size=8),
    zamba=dict(layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4, mamba_d_state=8, attention_head_dim=32,
               attention_hidden_size=2 * HIDDEN, num_key_value_heads=HEADS),
    zamba2=dict(layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, chunk_size=8,
                num_key_value_heads=HEADS),
    xmod=DECODER | dict(languages=["en_XX"], default_language="en_XX"),
    roc_bert=DECODER | dict(pronunciation_vocab_size=VOCAB, shape_vocab_size=VOCAB),
    blt=dict(encoder_hash_byte_group_vocab=50, encoder_hash_byte_group_size=[3]),
    hrm_text=dict(initializer_range=.1),
    dots3_note_text=dict(layer_types=["sliding_attention", "full_attention"]),
    qwen4_exp=dict(text_config=INDEXED),
    zaya=dict(num_experts_per_tok=1, router_hidden_size=SIZE),
)
CANNOT = dict(
    blt="transformers reads num_hidden_layers, which its configuration does not have",
    cpmant="transformers indexes beyond its position table for prompts",
    dots3_note="its vision configuration describes layers one by one, up to layer 41",
    dots3_note_text="38 million weights at the least",
    gemma3n="needs timm",
    perceiver="reads bytes with a tokenizer of its own, and has 269 million weights at the least",
    gemma4_assistant="reads the cache of another model",
    gemma4_unified_assistant="reads the cache of another model",
    layoutlmv2="needs detectron2",
    reformer="its forward pass fails for lengths that are no multiple of its chunks",
    musicgen="the configuration in transformers' table is that of the whole, which the class does not take",
    musicgen_melody="the configuration in transformers' table is that of the whole, which the class does not take",
)
# What tests/test_architectures.py finds of decoders.
# Plain transformers gives a row other numbers with padding on the left, or with other tokens behind it:
REFUSED = {
    *"bart bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text marian mbart mvp pegasus plbart".split(),
    *"prophetnet recurrent_gemma roberta roberta-prelayernorm rwkv trocr whisper xlm xlm-roberta".split(),
    *"xlm-roberta-xl xlnet xlstm xmod".split(),
}
# There is no cache, or it gives other numbers:
WITHOUT_CACHE = ("git", "moshi", "openai-gpt")
# By how much the steps of transformers' own `generate` differ from its single pass:
# Classifiers that compute with padding: only pairs of equal length are scored together.
READS_PADDING = {*"axk2 canine convbert fnet funnel mobilebert nystromformer t5gemma t5gemma2 yoso".split()}
# Layers that are shared, which peft merges once for each place:
NOT_MERGED = ("zamba",)
ROUGH = {"nemotron_h": .02, "zamba2": .02, "hrm_text": 3e-4}
DECODERS = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in CANNOT]
ONE_SCORE = ("mra", "xlnet") # As small as here, for whatever they read
CLASSIFIERS = [name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name not in (*CANNOT, *ONE_SCORE)]


def build(auto, config: PretrainedConfig):
    "A model with random weights, always the same."
    with torch.device("meta"): size = sum(p.numel() for p in auto.from_config(config).parameters())
    assert size < 12e6, f"{size:,} weights"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters(): # Experts must not tie
            if p.ndim > 1 and not p.any(): torch.nn.init.normal_(p, std=.2)
    return model


def decoder(name: str): return build(AutoModelForCausalLM, small(name))


def classifier(name: str):
    "A model with one score."
    bidirectional = dict(is_decoder=False) if "is_decoder" in OWN.get(name, {}) else {}
    return build(AutoModelForSequenceClassification, small(name, num_labels=1, **bidirectional))


def main(names: list[str]):
    "Build and run what is named, or everything."
    warnings.filterwarnings("ignore")
    ids = torch.randint(5, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    for make, known, wanted in ((decoder, DECODERS, (2, 12, VOCAB)), (classifier, CLASSIFIERS, (2, 1))):
        good = 0
        for name in known:
            if names and f"{make.__name__}:{name}" not in names and name not in names: continue
            start = time.time()
            try:
                model = make(name)
                with torch.no_grad(): logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                assert logits.shape[:2] == wanted[:2] and logits.isfinite().all(), logits.shape
                good += 1
                if not names: continue
                size, seconds = sum(p.numel() for p in model.parameters()), time.time() - start
                print(name, type(model).__name__, f"{size:,} weights, {seconds:.1f} s, logits vary by {logits.std()}")
            except Exception as e: print(name, make.__name__, type(e).__name__, " ".join(str(e).split())[:200])
        print(f"{good} of {len(known)} by {make.__name__}()")


if __name__ == "__main__": main(sys.argv[1:])
