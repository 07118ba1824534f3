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
from transformers.utils import logging

VOCAB = 300
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
LAYERS, HIDDEN, HEADS, SIZE, MLP, EXPERTS, WINDOW, LENGTH = 2, 64, 4, 16, 96, 4, 8, 256

SMALL = {name: value for names, value in {
    "vocab_size": VOCAB,
    "hidden_size n_embd d_model n_embed embedding_size emb_dim dim word_embed_proj_dim d_embed attention_hidden_size"
    " d_inner_model linear_attn_hidden_size lru_width input_embedding_size output_embedding_size": HIDDEN,
    "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers"
    " num_decoder_layers": LAYERS,
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"
    " swa_num_attention_heads": HEADS,
    "num_key_value_heads swa_num_key_value_heads num_kv_heads": 2,
    "head_dim kv_channels qk_nope_head_dim v_head_dim d_kv attention_head_dim swa_head_dim swa_v_head_dim"
    " linear_key_head_dim linear_value_head_dim": SIZE,
    "intermediate_size ffn_hidden_size n_inner ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner ffn_dim_inner"
    " ffn_intermediate_size dense_intermediate_size intermediate_size_mlp shared_intermediate_size dff d_ff": MLP,
    "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size moe_ffn_hidden_size"
    " moe_shared_expert_intermediate_size": 32,
    "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts moe_n_routed_experts": EXPERTS,
    "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k num_experts_topk top_k_experts": 2,
    "n_group topk_group num_expert_group n_shared_experts num_shared_experts": 1,
    "first_k_dense_replace num_dense_layers": 1,
    "sliding_window sliding_window_size attention_chunk_size attention_window_size local_attention window_size": WINDOW,
    "max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length seq_length": LENGTH,
    "q_lora_rank kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "type_vocab_size": 2,
    "index_n_heads": 16, "index_head_dim": SIZE, "index_topk": WINDOW, # With few heads, zeros tie
    "linear_num_key_heads linear_num_value_heads": 2,
    "router_jitter_noise input_jitter_noise": 0.,
    "initializer_range init_std embed_init_std": .2, "logit_scale logits_mup_width_multiplier": 1.,
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
    return shrink(CONFIG_MAPPING[name], **more)


def shrink(kind: type[PretrainedConfig], **own) -> PretrainedConfig:
    "A configuration of a class, with all of its parts."
    own, known = OWN.get(kind.model_type, {}) | own, fields(kind)
    given = {name: value for name, value in SMALL.items() if name in known} | IDS
    for name, field in kind.__dataclass_fields__.items(): # Dropout of every kind
        if "drop" in name and type(field.default) in (int, float): given[name] = 0.
    if "qk_rope_head_dim" in known: # Multi-head latent attention: all heads have keys, rotated ones of this size
        given |= {name: value for name, value in dict(num_key_value_heads=HEADS, head_dim=8).items() if name in known}
    for part in kind.sub_configs:
        inner = type(getattr(kind(), part)) # Where the class names any, the default one
        if inner is not type(None): given[part] = shrink(inner, **own.pop(part, {}))
    return kind(**given | own)


HYBRID = dict(layer_types=["linear_attention", "full_attention"])
CONV = dict(layer_types=["conv", "full_attention"])
SLIDING = dict(layer_types=["sliding_attention", "full_attention"])
MAMBA = dict(mamba_d_state=8, mamba_n_heads=8, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=8)
DECODER = dict(is_decoder=True)
DENSE_SPARSE = dict(mlp_layer_types=["dense", "sparse"])
# The last two layers read the keys and values of the first two
SHARED_KV = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_hidden_layers=4, num_kv_shared_layers=2)
# By the model type of a configuration, a part's as well
OWN: dict[str, dict] = (
    dict.fromkeys("""bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta
        roberta-prelayernorm roformer xlm-roberta xlm-roberta-xl""".split(), DECODER)
    | dict.fromkeys("""afmoe cohere2 cohere2_moe dots1 exaone4 exaone_moe flint gemma3_text kolibri1 laguna mellum
        ministral olmo3 vaultgemma""".split(), SLIDING)
    | dict.fromkeys("bailing_hybrid qwen3_next qwen3_5_text qwen3_5_moe_text".split(), HYBRID)
    | dict.fromkeys("lfm2 lfm2_moe".split(), CONV)
) | dict(
    bamba=dict(attn_layer_indices=[1], **MAMBA),
    beam=DENSE_SPARSE,
    big_bird=DECODER | dict(attention_type="original_full"),
    blt=dict(num_hidden_layers=LAYERS, # No field of its own, but transformers reads it for the cache
             encoder_hash_byte_group_vocab=50, encoder_hash_byte_group_size=[3],
             local_attention_window_len=WINDOW,
             encoder_config=dict(hidden_size_global=HIDDEN), decoder_config=dict(hidden_size_global=HIDDEN)),
    canine=dict(num_hash_buckets=LENGTH, local_transformer_stride=16),
    codegen=dict(rotary_dim=8),
    cohere_compass_text=SLIDING | dict(rope_parameters=dict(
        full_attention=dict(rope_type="default", rope_theta=1e4),
        sliding_attention=dict(rope_type="default", rope_theta=1e4))),
    cpmant=dict(dim_head=SIZE, dim_ff=MLP, prompt_types=4, prompt_length=2, segment_types=4),
    dbrx=dict(attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.)),
    deepseek_v4=dict(
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        mlp_layer_types=["hash_moe", "moe", "moe"], num_hidden_layers=3, num_key_value_heads=1, hc_mult=2, o_groups=2,
        o_lora_rank=SIZE, partial_rotary_factor=.5,
        compress_rates=dict(compressed_sparse_attention=2, heavily_compressed_attention=4)),
    dots3_note_text=SLIDING | dict(
        n_group=1, shared_experts_intermediate_size=32, num_key_value_heads=HEADS, head_dim=24, qk_nope_head_dim=16,
        swa_num_attention_heads=HEADS, swa_num_key_value_heads=HEADS, swa_q_lora_rank=32, swa_kv_lora_rank=32,
        swa_head_dim=24, swa_qk_nope_head_dim=16, swa_v_head_dim=16),
    dots3_note_vision_encoder=DENSE_SPARSE | dict(adapter_in_dim=HIDDEN, adapter_out_dim=HIDDEN),
    dots3_note_audio_encoder=dict(adapter_input_size=HIDDEN, adapter_out_dim=HIDDEN, downsample_hidden_size=16,
                                  feature_size=16),
    esmc=dict(num_key_value_heads=HEADS),
    falcon_h1=dict(mamba_d_ssm=128, **MAMBA),
    flint=SLIDING | dict(mlp_only_layers=[0]),
    funnel=dict(block_sizes=[1, 1, 1], d_head=SIZE),
    gemma3n_text=SHARED_KV | dict(activation_sparsity_pattern=[.5, 0., 0., 0.], intermediate_size=[MLP] * 4),
    gemma4_text=SHARED_KV | dict(enable_moe_block=True, global_head_dim=32),
    gemma4_unified_text=SLIDING | dict(global_head_dim=32),
    got_ocr2_vision=dict(mlp_dim=MLP, output_channels=SIZE, window_size=2, global_attn_indexes=[1]),
    gpt_neo=dict(attention_types=[[["global", "local"], 1]]),
    gptj=dict(rotary_dim=8),
    granitemoehybrid=dict(layer_types=["mamba", "attention"], **MAMBA),
    hrm_text=dict(initializer_range=.1),
    inkling_text=dict(layer_types=["hybrid_sliding", "hybrid"], d_rel=8, rel_extent=16, **DENSE_SPARSE),
    inkling2_text=dict(layer_types=["hybrid_sliding", "hybrid"], d_rel=8, rel_extent=16),
    jamba=dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=8),
    kimi_linear=HYBRID | dict(linear_head_dim=SIZE, linear_num_heads=2),
    layoutlmv3=dict(visual_embed=False, coordinate_size=10, shape_size=12),
    lfm3=dict(layer_types=["conv", "sliding_attention", "full_attention"], num_hidden_layers=3),
    lilt=dict(hidden_size=48),
    llama4_text=dict(no_rope_layers=[1, 0], interleave_moe_layer_step=2),
    longcat_flash=dict(num_layers=1, zero_expert_num=2),
    longformer=dict(attention_window=WINDOW),
    luke=dict(entity_vocab_size=10, entity_emb_size=SIZE),
    mamba2=dict(num_heads=8, head_dim=SIZE, state_size=8, n_groups=1, chunk_size=8),
    markuplm=dict(max_depth=4, xpath_unit_hidden_size=8, max_xpath_tag_unit_embeddings=32,
                  max_xpath_subs_unit_embeddings=32, tag_pad_id=16, subs_pad_id=16),
    minicpm3=dict(dim_model_base=HIDDEN),
    minimax_m3_vl_text=DENSE_SPARSE | dict(layer_types=["full_attention", "minimax_m3_sparse"], rotary_dim=8,
                                           index_block_size=4, index_topk_blocks=2, index_n_heads=2),
    mpt=dict(attn_config=dict(attn_pdrop=0)),
    nemotron_h=dict(mamba_num_heads=8, mamba_head_dim=SIZE, ssm_state_size=8, n_groups=1, chunk_size=8),
    perceiver=dict(num_latents=8, d_latents=HIDDEN, num_self_attends_per_block=2, num_self_attention_heads=HEADS,
                   num_cross_attention_heads=HEADS),
    phi4_multimodal_audio=dict(num_blocks=2, ext_pw_out_channel=HIDDEN, depthwise_separable_out_channel=HIDDEN,
                               nemo_conv_channels=8, bias_max_distance=50),
    qwen4_exp_text=HYBRID | dict(
        indexer_n_heads=16, indexer_kv_heads=1, indexer_head_dim=SIZE, indexer_budget=WINDOW, indexer_compress_ratio=4,
        ngram_vocab_size_base=500, hc_lowrank=8, heads_per_ngram=2, split_ngram_parts=1),
    recurrent_gemma=dict(block_types=["recurrent", "attention"]),
    reformer=DECODER | dict(
        attn_layers=["local", "lsh"], axial_pos_shape=[16, 16], axial_pos_embds_dim=[16, 48], feed_forward_size=MLP,
        attention_head_size=SIZE, local_attn_chunk_length=4, lsh_attn_chunk_length=4, num_buckets=4, hash_seed=0),
    roc_bert=DECODER | dict(pronunciation_vocab_size=VOCAB, shape_vocab_size=VOCAB),
    t5=dict(decoder_start_token_id=0),
    xlstm=dict(embedding_dim=HIDDEN, num_blocks=2, qk_dim_factor=1., chunk_size=8),
    xmod=DECODER | dict(languages=["en_XX"], default_language="en_XX"),
    zamba=dict(layers_block_type=["mamba", "hybrid"] * 2, num_hidden_layers=4, mamba_d_state=8, attention_head_dim=32,
               attention_hidden_size=2 * HIDDEN, num_key_value_heads=HEADS),
    zamba2=dict(layers_block_type=["mamba", "hybrid"], mamba_d_state=8, n_mamba_heads=8, chunk_size=8,
                num_key_value_heads=HEADS),
    zaya=dict(layer_types=["hybrid_sliding", "hybrid"], num_experts_per_tok=1, router_hidden_size=SIZE),
)
# Names that no configuration here builds, for both tables
CANNOT = dict(
    gemma3n="its vision tower needs timm, which is not installed",
    gemma4_assistant="reads the keys and values of another model, and its layers refuse a configuration without any",
    gemma4_unified_assistant="as gemma4_assistant",
    layoutlmv2="needs detectron2, which is not installed",
    musicgen="the table maps the configuration of the whole, which the decoder's class does not take",
    musicgen_melody="as musicgen",
)
# What tests/test_architectures.py finds of decoders.
# Plain transformers gives a row other numbers with padding on the left, or with other tokens behind it:
REFUSED = {
    *"bart bigbird_pegasus blenderbot blenderbot-small camembert data2vec-text marian mbart mvp pegasus plbart".split(),
    *"prophetnet recurrent_gemma roberta roberta-prelayernorm rwkv trocr whisper xlm xlm-roberta".split(),
    *"xlm-roberta-xl xlnet xlstm xmod".split(),
    *"blt cpmant deepseek_v4 minimax_m3_vl_text reformer".split(),
}
# There is no cache, or it gives other numbers:
WITHOUT_CACHE = ("git", "moshi", "openai-gpt")
# Layers that are shared, which peft merges once for each place:
NOT_MERGED = ("zamba",)
# By how much the steps of transformers' own `generate` differ from its single pass:
ROUGH = {"nemotron_h": .02, "zamba2": .02, "hrm_text": 3e-4}
# Classifiers that compute with padding: only pairs of equal length are scored together.
READS_PADDING = {*"canine convbert fnet funnel mobilebert nystromformer reformer t5gemma t5gemma2 xlnet yoso".split()}
# Attention is zero without its CUDA kernel:
ONE_SCORE = ("mra",)
DECODERS = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in CANNOT]
CLASSIFIERS = [name for name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES if name not in (*CANNOT, *ONE_SCORE)]


def build(auto, config: PretrainedConfig):
    "A model with random weights, always the same."
    with torch.device("meta"): size = sum(p.numel() for p in auto.from_config(config).parameters())
    assert size < 1e6, f"{size:,} weights"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(config, dtype=torch.float32).eval()
        for p in model.parameters(): # Experts must not tie
            if p.ndim > 1 and not p.any(): torch.nn.init.normal_(p, std=.2)
        for name, table in model.named_buffers(): # Experts by token, which a checkpoint has
            if name.endswith("tid2eid"): table.copy_((torch.arange(VOCAB)[:, None] + torch.arange(2)) % EXPERTS)
    return model


def decoder(name: str):
    "A model with logits for the next token."
    return build(AutoModelForCausalLM, small(name))


def classifier(name: str):
    "A model with one score."
    bidirectional = dict(is_decoder=False) if "is_decoder" in OWN.get(name, {}) else {}
    return build(AutoModelForSequenceClassification, small(name, num_labels=1, **bidirectional))


def main(names: list[str]):
    "Build and run what is named, or everything."
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    ids = torch.randint(5, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    for make, table, shape in (
        (decoder, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, (2, 12, VOCAB)),
        (classifier, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, (2, 1)),
    ):
        if make is classifier: ids[:, -1] = IDS["eos_token_id"] # Where encoder-decoders read the score
        known, good, began = [name for name in table if not names or name in names], 0, time.time()
        for name in known:
            start = time.time()
            try:
                model = make(name)
                with torch.no_grad(): logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                assert logits.shape == shape and logits.isfinite().all(), tuple(logits.shape)
                good += 1
                size = sum(p.numel() for p in model.parameters())
                print(name, type(model).__name__, f"{size:,} weights, {time.time() - start:.2f} s")
            except Exception as e:
                print(name, "CANNOT:" if name in CANNOT else "ERROR:", type(e).__name__, " ".join(str(e).split())[:150])
        print(f"{good} of {len(known)} by {make.__name__}(), {time.time() - began:.1f} s")


if __name__ == "__main__": main(sys.argv[1:])
