"""Random models of a real shape with byte-level BPE tokenizers, and prompts of one length: for timing only."""
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from rlhf_nb.testing import DECODERS as SMALL
from rlhf_nb.testing import shipped_rows

IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3)
GEMMA3 = dict(vocab_size=262144, num_attention_heads=4, num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256,
              sliding_window=512)
DECODERS = {  # Architecture, and the shape that its publisher gave it
    "BLOOM 560m": ("bloom", BloomConfig, dict(vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16)),
    "Llama 3.2 1B": ("llama", LlamaConfig, dict(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, tie_word_embeddings=True)),
    "Qwen3 0.6B": ("qwen3", Qwen3Config, dict(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)),
    "Gemma 3 270M": ("gemma3", Gemma3TextConfig, dict(
        GEMMA3, hidden_size=640, intermediate_size=2048, num_hidden_layers=18)),
    "Gemma 3 1B": ("gemma3", Gemma3TextConfig, dict(
        GEMMA3, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26)),
}


def bloom(layers: int, heads: int, hidden: int, vocab: int) -> BloomConfig:
    "BLOOM of this shape."
    return BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=layers, n_head=heads, **IDS)


def deberta(layers: int, heads: int, hidden: int, vocab: int) -> DebertaV2Config:
    "DeBERTa v3 of this shape, with a score."
    return DebertaV2Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, max_position_embeddings=512,
        type_vocab_size=0, pooler_hidden_size=hidden, num_labels=1, pad_token_id=0)


def decoder_config(name: str, quick: bool = False) -> PretrainedConfig: # A key of `DECODERS`; quick: a tiny one
    "The configuration of a decoder, with the special tokens of `POLICY_TOKENS`."
    arch, kind, shape = DECODERS[name]
    return SMALL[arch](vocab_size=1000, **IDS) if quick else kind(**shape, **IDS)


TODAY = dict(reward=deberta(2, 4, 128, 6000), batch=16, minibatches=1, prompt=64, response=64, epochs=(1, 4),
             steps=3)
SHAPES = {  # Configurations of policy and reward model; work of an update; passes and updates to time
    "gemma3-270m": dict(TODAY, policy=decoder_config("Gemma 3 270M")),
    "qwen3-0.6b": dict(TODAY, policy=decoder_config("Qwen3 0.6B")),
    "560m": dict(policy=decoder_config("BLOOM 560m"), reward=deberta(24, 16, 1024, 128100),
                 batch=2, minibatches=2, prompt=256, response=256, epochs=(4,), steps=3),
    "tiny": dict(policy=bloom(4, 4, 256, 8000), reward=deberta(2, 4, 128, 6000),
                 batch=32, minibatches=4, prompt=64, response=48, epochs=(4,), steps=10),
}
POLICY_TOKENS = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
REWARD_TOKENS = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]", mask_token="[MASK]")


def train_tokenizer(texts: list[str],
                    size: int,                # Vocabulary, at most
                    special: dict[str, str],
) -> PreTrainedTokenizerFast:
    "A byte-level BPE; with DeBERTa's special tokens it writes pairs as DeBERTa reads them."
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*special.values()], show_progress=False,
                                  initial_alphabet=alphabet)
    tok.train_from_iterator(texts, trainer)
    if "cls_token" in special:
        begin, end = special["cls_token"], special["sep_token"]
        tok.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}", pair=f"{begin} $A {end} $B:1 {end}:1",
            special_tokens=[(token, tok.token_to_id(token)) for token in (begin, end)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, **special)


def with_every_token(tok: PreTrainedTokenizerFast, size: int) -> PreTrainedTokenizerFast: # Ids of the model
    "The same with a text for every id: a random model samples all of them, and the reward model reads what it wrote."
    state = json.loads(tok.backend_tokenizer.to_str())
    words = state["model"]["vocab"]
    for i in range(len(words), size): words[f"Ġw{i}"] = i
    special = {name: getattr(tok, name) for name in POLICY_TOKENS}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **special)


def on_device() -> torch.device: # As a context: new tensors are made there
    "The GPU if there is one: it draws random weights in a moment."
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def random_decoder(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    "A model with the same random weights whenever it is made on this device."
    torch.manual_seed(0)
    with on_device(): return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make(shape: str,
         out: Path,
         dtype: torch.dtype = torch.bfloat16, # Of the policy's weights; the reward model's are float32, as published
):
    "Write policy/, reward/ and prompts.jsonl."
    texts = ["\n".join(filter(None, (r["instruction"], r["input"], r["output"]))) for r in shipped_rows()]
    s = SHAPES[shape]
    torch.manual_seed(0)
    policy, reward = s["policy"], s["reward"]
    tok = train_tokenizer(texts, min(policy.vocab_size, 8000), POLICY_TOKENS)
    with_every_token(tok, policy.vocab_size).save_pretrained(out/"policy")
    random_decoder(policy, dtype).save_pretrained(out/"policy")
    ids = tok(" ".join(texts)).input_ids
    n = s["prompt"] + 40
    with open(out/"prompts.jsonl", "w", encoding="utf-8") as file:
        for i in range(0, len(ids) - n, n):
            file.write(json.dumps(dict(prompt=tok.decode(ids[i:i + n])), ensure_ascii=False) + "\n")
    train_tokenizer(texts, min(reward.vocab_size, 6000), REWARD_TOKENS).save_pretrained(out/"reward")
    with on_device(): DebertaV2ForSequenceClassification(reward).save_pretrained(out/"reward")


if __name__ == "__main__": make(sys.argv[1], Path(sys.argv[2]))
