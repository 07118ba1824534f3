"Small models, data and callbacks for tests that run scripts, written for TRL's trainers or for this one."
import functools
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    TrainerCallback,
)

COLOURS = "red orange yellow green blue violet black white grey brown pink gold".split()
SPECIAL = ["<pad>", "<end>", "<unk>", "<user>", "<assistant>", "<system>", "<calm>"]
CHAT = ("{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
        "{% if calm is defined and calm %}<calm> {% endif %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")
PROMPTS = ["red orange", "yellow", "green blue violet", "black", "white grey", "brown", "pink", "gold red"]
CHATS = [[dict(role="user", content=p)] for p in PROMPTS]


def save_models(folder):
    "Small random models with one tokenizer: policy, judge (one label), judge2, gpt2 (has dropout), experts."
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + COLOURS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>", unk_token="<unk>",
                                        padding_side="left", additional_special_tokens=SPECIAL[3:], chat_template=CHAT)
    ids = dict(vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None, initializer_range=.3)
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                 intermediate_size=16, max_position_embeddings=64, **ids)
    experts = Qwen3MoeConfig(**shape, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    decoder, judge = AutoModelForCausalLM, AutoModelForSequenceClassification
    for seed, (name, auto,
               config) in enumerate([("policy", decoder, LlamaConfig(**shape)),
                                     ("judge", judge, LlamaConfig(**shape, num_labels=1)),
                                     ("judge2", judge, LlamaConfig(**shape, num_labels=1)),
                                     ("experts", decoder, experts),
                                     ("gpt2", decoder,
                                      GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **ids))]):
        torch.manual_seed(seed)
        auto.from_config(config).save_pretrained(folder/name)
        tokenizer.save_pretrained(folder/name)
    return folder


def length(completions, **kwargs): return [float(len(c)) for c in completions]


def reds(completions, **kwargs): return [float(c.count("red")) for c in completions]


@functools.cache
def models_folder(): return TemporaryDirectory()


@functools.cache
def small_models(): return save_models(Path(models_folder().name))


class Kit:
    "The classes of one library, the models, and a folder that a script writes to."
    def __init__(self, Trainer, Config, out):
        self.Trainer = Trainer
        self.Config = Config
        self.out = out
        self.models = small_models()
        self.policy = str(self.models/"policy")
        self.judge = str(self.models/"judge")

    def args(self, **more):
        quiet = dict(output_dir=self.out, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True,
                     bf16=False, gradient_checkpointing=False)
        small = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4, num_generations=2,
                     max_completion_length=4, max_steps=2)
        return self.Config(**quiet | small | dict(logging_steps=1, shuffle_dataset=False, learning_rate=1e-3) | more)

    def data(self, prompts=PROMPTS, **columns): return Dataset.from_dict(dict(prompt=prompts, **columns))

    def trainer(self, reward_funcs=length, model=None, train_dataset=None, eval_dataset=None, processing_class=None,
                reward_processing_classes=None, callbacks=None, optimizers=(None, None), peft_config=None, **args):
        return self.Trainer(model=model or self.policy, reward_funcs=reward_funcs, args=self.args(**args),
                            train_dataset=train_dataset or self.data(), eval_dataset=eval_dataset,
                            processing_class=processing_class, reward_processing_classes=reward_processing_classes,
                            callbacks=callbacks, optimizers=optimizers, peft_config=peft_config)

    def train(self, *positional, **named):
        trainer = self.trainer(*positional, **named)
        trainer.train()
        return trainer

    def files(self, below=""):
        return {str(p.relative_to(self.out/below)) for p in (self.out/below).rglob("*") if p.is_file()}


def keys(trainer): return {k for entry in trainer.state.log_history for k in entry}


def logged(trainer, key): return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(model): return {n: p.detach().clone() for n, p in model.named_parameters()}


def moved(trainer, before): return {n for n, p in before.items() if not torch.equal(p, trainer.model.get_parameter(n))}


def fails(call, *positional, **named):
    "The kind of error, or None."
    try: call(*positional, **named)
    except Exception as error: return type(error).__name__


class Calls:
    "A reward function that keeps what it was given."
    __name__ = "calls"
    def __init__(self, score=length): self.score, self.seen = score, []
    def __call__(self, **kwargs):
        self.seen.append(kwargs)
        return self.score(**kwargs)
    def of(self, key): return [call[key] for call in self.seen]


class Events(TrainerCallback):
    "Every event, in order."
    def __init__(self):
        self.seen = []
        for name in dir(TrainerCallback):
            if name.startswith("on_"): setattr(self, name, functools.partial(self.note, name))

    def note(self, event, *args, **kwargs): self.seen.append(event)
