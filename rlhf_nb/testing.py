"""Random models and tokenizers for examples and tests, and a run that takes seconds."""
import json
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    DebertaV2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

if TYPE_CHECKING:
    from .trainer import PPOTrainer


def data_dir() -> Path: # The folder that holds what the project ships
    "`data/`, installed or in a checkout."
    here = Path(find_spec("rlhf_nb").origin).parent
    return here/"data" if (here/"data").is_dir() else here.parent/"data"


def shipped_rows() -> list[dict]: # Alpaca rows: instruction, input, output
    "The prompts that come with the project."
    files = sorted((data_dir()/"finetune").glob("*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text(encoding="utf-8").strip().split("\n")]


def shipped_texts() -> Iterator[str]:
    "Every text of the shipped prompts."
    return (text for row in shipped_rows() for text in row.values())


def train_bpe(texts: Iterable[str],
              size: int,           # Vocabulary, at most
              special: list[str],  # Special tokens, from id 0 on
) -> Tokenizer:
    "A byte-level BPE."
    tok, bytes_ = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex("[\u4e00-\u9fff]"), "isolated"), bytes_])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tok.train_from_iterator(texts, trainer)
    return tok


def policy_tokenizer(texts: Iterable[str] | None = None, # To learn from; default: the shipped prompts
                     size: int = 1000,                   # Vocabulary, at most
) -> PreTrainedTokenizerFast:
    "BLOOM's special tokens; pads on the left."
    tok = train_bpe(texts or shipped_texts(), size, ["<unk>", "<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=tok, padding_side="left",
                                   unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def reward_tokenizer(texts: Iterable[str] | None = None, # To learn from; default: the shipped prompts
                     size: int = 600,                    # Vocabulary, at most
) -> PreTrainedTokenizerFast:
    "DeBERTa's special tokens; writes question and answer as a pair; reads at most 512 tokens."
    tok = train_bpe(texts or shipped_texts(), size, ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    tok.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1",
                                                       special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
                                   unk_token="[UNK]", mask_token="[MASK]", model_max_length=512)


_rope = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
DECODERS = dict(
    bloom=lambda **kw: BloomConfig(**{**dict(hidden_size=64, n_layer=2, n_head=4), **kw}),
    gpt2=lambda **kw: GPT2Config(n_embd=64, n_layer=2, n_head=4, **kw),
    llama=lambda **kw: LlamaConfig(num_key_value_heads=2, **_rope, **kw),
    qwen3=lambda **kw: Qwen3Config(num_key_value_heads=2, head_dim=16, **_rope, **kw),
    gemma3=lambda **kw: Gemma3TextConfig(num_key_value_heads=1, head_dim=16, sliding_window=16,
                                         layer_types=["sliding_attention", "full_attention"], **_rope, **kw),
    gpt_neox=lambda **kw: GPTNeoXConfig(**_rope, **kw),
)


def tiny_policy(arch: str = "bloom", # A key of `DECODERS`
                seed: int = 0,       # Of the random weights
                **config,            # More of the architecture's own settings
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    "A random decoder of about 0.2M parameters, with its tokenizer."
    tok = policy_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ids = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
        model = AutoModelForCausalLM.from_config(DECODERS[arch](vocab_size=len(tok), **{**ids, **config}))
    return model.eval(), tok


def deberta_config(tok: PreTrainedTokenizerFast, **config) -> DebertaV2Config: # With DeBERTa's own settings, if given
    "DeBERTa-v3's kind of attention, small; one label."
    shape = dict(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        relative_attention=True,
        position_buckets=32,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
        position_biased_input=False,
        max_position_embeddings=512,
        type_vocab_size=0,
        num_labels=1,
    )
    shape |= config
    return DebertaV2Config(
        vocab_size=len(tok), pad_token_id=tok.pad_token_id, pooler_hidden_size=shape["hidden_size"], **shape
    )


def tiny_reward_model(seed: int = 0, # Of the random weights
                      **config,      # DeBERTa's own settings
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    "A random DeBERTa-v2 classifier, with a tokenizer of its own."
    tok = reward_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_config(deberta_config(tok, **config))
    return model.eval(), tok


def save_tiny(path: str | Path, # Folder; gets `policy/` and `reward/`
              seed: int = 0,    # Of the random weights
) -> tuple[Path, Path]:         # The two folders
    "Write a random policy and a random reward model, each with its tokenizer."
    path = Path(path)
    big = dict(initializer_range=.2)
    for name, (model, tok) in dict(
        policy=tiny_policy(seed=seed, **big), reward=tiny_reward_model(seed=seed + 1, **big)
    ).items():
        model.save_pretrained(path/name)
        tok.save_pretrained(path/name)
    return path/"policy", path/"reward"


def count_e(prompts: list, completions: list[str], **columns) -> list[float]:
    "A reward that anyone can check: how often the letter e occurs."
    return [float(c.count("e")) for c in completions]


def tiny_run(arch: str = "bloom",          # A key of `DECODERS`
             reward_funcs=count_e,         # As for `PPOTrainer`
             lora: bool = True,            # Train an adapter; False: all weights
             data: Dataset | None = None,  # With a `prompt`; default: 50 short prompts
             callbacks: list | None = None,
             **settings,                   # Of `PPOConfig`
) -> "PPOTrainer":
    "A trainer of a random model that learns in seconds."
    from .config import PPOConfig
    from .trainer import PPOTrainer
    if data is None: data = Dataset.from_dict(dict(prompt=[f"Tell me about the number {i}." for i in range(50)]))
    model, tok = tiny_policy(arch, initializer_range=.2)
    given = (
        dict(
            output_dir=settings.get("output_dir") or mkdtemp(),
            per_device_train_batch_size=16,
            steps_per_generation=2,
            num_iterations=4,
            max_completion_length=12,
            min_completion_length=4,
            max_steps=40,
            learning_rate=0.02,
            lr_scheduler_type="constant",
            beta=0.2,
            adap_kl_ctrl=True,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            report_to="none",
            seed=0,
        )
        | settings
    )
    adapter = LoraConfig(r=8, lora_dropout=.1, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    few = data.select(range(min(4, len(data))))
    return PPOTrainer(
        model,
        reward_funcs,
        PPOConfig(**given),
        data,
        few,
        processing_class=tok,
        callbacks=callbacks,
        peft_config=adapter,
    )
