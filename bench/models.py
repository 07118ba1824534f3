"""Random models of a real shape with byte-level BPE tokenizers, and prompts of one length: for timing only."""
import json
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_nb.testing import shipped_rows

SHAPES = {  # Layers, heads, hidden size and vocabulary of policy and reward model; work of an update; updates to time
    "560m": dict(policy=(24, 16, 1024, 250880), reward=(24, 16, 1024, 128100),
                 batch=2, minibatches=2, prompt=256, response=256, epochs=4, steps=3),
    "tiny": dict(policy=(4, 4, 256, 8000), reward=(2, 4, 128, 6000),
                 batch=32, minibatches=4, prompt=64, response=48, epochs=4, steps=10),
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


def make(shape: str, out: Path):
    "Write policy/, reward/ and prompts.jsonl."
    texts = ["\n".join(filter(None, (r["instruction"], r["input"], r["output"]))) for r in shipped_rows()]
    s = SHAPES[shape]
    torch.manual_seed(0)
    layers, heads, hidden, vocab = s["policy"]
    tok = train_tokenizer(texts, min(vocab, 8000), POLICY_TOKENS)
    tok.save_pretrained(out/"policy")
    policy = BloomConfig(vocab_size=vocab, hidden_size=hidden, n_layer=layers, n_head=heads, bos_token_id=1,
                         eos_token_id=2, pad_token_id=3)
    BloomForCausalLM(policy).save_pretrained(out/"policy")
    ids = tok(" ".join(texts)).input_ids
    n = s["prompt"] + 40
    with open(out/"prompts.jsonl", "w", encoding="utf-8") as file:
        for i in range(0, len(ids) - n, n):
            file.write(json.dumps(dict(prompt=tok.decode(ids[i:i + n])), ensure_ascii=False) + "\n")
    layers, heads, hidden, vocab = s["reward"]
    train_tokenizer(texts, min(vocab, 6000), REWARD_TOKENS).save_pretrained(out/"reward")
    reward = DebertaV2Config(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * hidden, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, max_position_embeddings=512,
        type_vocab_size=0, pooler_hidden_size=hidden, num_labels=1, pad_token_id=0)
    DebertaV2ForSequenceClassification(reward).save_pretrained(out/"reward")


if __name__ == "__main__": make(sys.argv[1], Path(sys.argv[2]))
