"""Reward models in more forms: several labels, tokenizers without padding, wrappers, adapters, own modules."""
import re
from copy import deepcopy

import pytest
import torch
from architectures import OWN, VOCAB, build, classifier, small
from peft import LoraConfig, get_peft_model
from test_cases import POLICY, REWARD, trainer_for
from test_cli import short
from test_wrong_calls import refused
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_nb.config import PPOConfig
from rlhf_nb.rewards import RewardModel, as_reward
from rlhf_nb.testing import policy_tokenizer, reward_tokenizer

pytestmark = pytest.mark.slow

DECODERS = "llama gpt2 qwen2 qwen3 bloom mistral gpt_neox opt mixtral gemma3_text phi3 falcon".split()
ENCODERS = "bert roberta xlm-roberta deberta-v2 deberta distilbert electra albert modernbert xlnet".split()
QUESTIONS = ["What now?", "My son has had a cold for three days. " * 2, "Hi", "Tell me about it, please"]
ANSWERS = ["Rest.", "Drink water.", "Walk a little every day. " * 4, "No"]
ARGS = PPOConfig("unused", bf16=False, use_cpu=True)
CPU = torch.device("cpu")
TOKENIZERS = dict(pairs=reward_tokenizer(size=290), text=policy_tokenizer(size=290))


def tokenizer(kind, *without):
    "The pairs' or the plain text's, without some of its special tokens."
    tok = deepcopy(TOKENIZERS[kind])
    tok.model_max_length = 200
    for name in without: setattr(tok, name, None)
    return tok


def labels(name, n, **more):
    bidirectional = dict(is_decoder=False) if "is_decoder" in OWN.get(name, {}) else {}
    return build(AutoModelForSequenceClassification, small(name, num_labels=n, **bidirectional | more))


def own_scores(reward, questions=QUESTIONS, answers=ANSWERS):
    "Together, each alone, and in another order."
    together = reward(questions, answers)
    alone = [reward([q], [a])[0] for q, a in zip(questions, answers)]
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert reward(questions[::-1], answers[::-1])[::-1] == pytest.approx(together, rel=1e-4, abs=1e-4)
    assert len({*together}) == len(together)
    return together


def plainly(model, tok, kind, label=0):
    "By transformers, a pair at a time, without any padding."
    found = []
    for q, a in zip(QUESTIONS, ANSWERS):
        encoded = tok(q, a) if kind == "pairs" else tok(q + a, add_special_tokens=False)
        inputs = {k: torch.tensor([v]) for k, v in encoded.items()}
        with torch.no_grad(): found.append(model(**inputs).logits[0, label].item())
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("n", [2, 3])
def test_several_labels(name, n):
    tok = tokenizer("pairs")
    with pytest.raises(ValueError, match=rf"reward_label=None: the reward model has {n} labels .*LABEL_0"):
        RewardModel(labels(name, n), tok)
    each = [own_scores(RewardModel(labels(name, n), tok, label=str(i))) for i in range(n)]
    assert len({tuple(x) for x in each}) == n
    assert own_scores(RewardModel(labels(name, n), tok, label=f"LABEL_{n - 1}")) == pytest.approx(each[-1], abs=1e-6)
    for wrong in (str(n), "-1", "label_0", "good", "", "0.0"):
        with pytest.raises(ValueError, match=f"reward_label={re.escape(wrong)}"):
            RewardModel(labels(name, n), tok, label=wrong)


def test_labels_with_names():
    model = labels("bert", 2, id2label={0: "bad", 1: "1"}, label2id={"bad": 0, "1": 1})
    assert RewardModel(model, tokenizer("pairs"), label="bad").label == 0
    assert RewardModel(labels("bert", 2), tokenizer("pairs"), label="1").label == 1
    model = labels("bert", 2, id2label={0: "1", 1: "0"}, label2id={"1": 0, "0": 1})
    assert RewardModel(model, tokenizer("pairs"), label="1").label == 0 # A name goes first


@pytest.mark.parametrize("label", ["0", "LABEL_0", "good", "7"])
def test_a_label_for_a_model_with_one(label):
    assert RewardModel(labels("bert", 1), tokenizer("pairs"), label=label).label == 0


SPECIAL = {"pad": ["pad_token"], "all but EOS": ["pad_token", "unk_token", "bos_token"],
           "all": ["pad_token", "unk_token", "bos_token", "eos_token", "cls_token", "mask_token"]}


@pytest.mark.parametrize("without", SPECIAL)
@pytest.mark.parametrize("kind", ["pairs", "text"])
@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_a_tokenizer_without_a_pad_token(name, kind, without):
    if kind == "pairs" and without == "all but EOS": pytest.skip("it has no EOS")
    tok = tokenizer(kind, *SPECIAL[without])
    assert tok.pad_token is None
    if without == "all":
        with pytest.raises(ValueError, match="no token to pad with"): RewardModel(classifier(name), tok)
        return
    expected = plainly(classifier(name), tok, kind)
    assert own_scores(RewardModel(classifier(name), tok)) == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("pad", [None, 0, 7, VOCAB - 1, VOCAB + 5, -1])
@pytest.mark.parametrize("kind", ["pairs", "text"])
@pytest.mark.parametrize("name", "llama gpt2 bloom qwen3 mistral bert roberta deberta-v2 modernbert distilbert".split())
def test_another_pad_in_the_config(name, kind, pad):
    tok, model = tokenizer(kind), classifier(name)
    model.config.pad_token_id = pad
    expected = None if pad is None and name in DECODERS else plainly(classifier(name), tok, kind)
    found = own_scores(RewardModel(model, tok))
    if expected: assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


class Own(nn.Module):
    "A user's module without a config."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, input_ids, attention_mask=None): return self.layer(input_ids[:, :4].float())


class Callable(Own):
    "One that takes what a reward function takes."
    def forward(self, completions, **_): return [float(len(c)) for c in completions]


def seq(): return AutoModelForSequenceClassification.from_pretrained(REWARD)


def adapted():
    torch.manual_seed(0)
    return get_peft_model(seq(), LoraConfig(r=4, target_modules=["query_proj"], init_lora_weights=False,
                                            task_type="SEQ_CLS"))


PAIR = ["What helps?", "Help"], ["Rest a day.", "Drink a glass of water."]


@pytest.mark.parametrize("make", [
    seq, adapted, lambda: nn.DataParallel(seq()), lambda: torch.compile(seq(), backend="eager"),
], ids=["PreTrainedModel", "PeftModel", "DataParallel", "compiled"])
@pytest.mark.parametrize("given", [True, False], ids=["tokenizer", "none"])
def test_modules_as_rewards(make, given):
    tok = AutoTokenizer.from_pretrained(REWARD)
    model = make()
    plain = adapted().merge_and_unload() if make is adapted else seq()
    try: reward = as_reward(model, tok if given else None, ARGS, CPU)
    except (TypeError, ValueError) as e:
        assert type(model).__name__ in str(e)
        return
    assert reward(*PAIR) == pytest.approx(RewardModel(plain, tok)(*PAIR), abs=1e-5)


@pytest.mark.parametrize("given", [True, False], ids=["tokenizer", "none"])
@pytest.mark.parametrize("module", [Own, lambda: nn.Linear(4, 1), lambda: nn.Sequential(nn.Linear(4, 1))],
                         ids=["own", "linear", "sequential"])
def test_a_module_that_is_no_model_is_named(module, given, tmp_path):
    tok = AutoTokenizer.from_pretrained(REWARD) if given else None
    with pytest.raises((TypeError, ValueError), match=type(module()).__name__): as_reward(module(), tok, ARGS, CPU)
    with pytest.raises((TypeError, ValueError), match=type(module()).__name__):
        trainer_for(tmp_path/"out", reward=module())


def test_a_module_that_is_called_as_a_reward_function(tmp_path):
    "Or an error that names it."
    try: trainer = trainer_for(tmp_path, reward=Callable())
    except (TypeError, ValueError) as e:
        assert "Callable" in str(e)
        return
    trainer.train()


def test_a_causal_model_as_a_reward_is_named(tmp_path):
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(POLICY)
    with pytest.raises((TypeError, ValueError), match=type(model).__name__): trainer_for(tmp_path, reward=model)


@pytest.mark.parametrize("how", ["python", "command"])
@pytest.mark.parametrize("beside", [False, True], ids=["adapter", "with tokenizer"])
def test_an_adapter_of_a_classifier_by_name(how, beside, tmp_path, capsys):
    "It loads, or one line names the setting."
    adapted().save_pretrained(tmp_path/"own")
    if beside: AutoTokenizer.from_pretrained(REWARD).save_pretrained(tmp_path/"own")
    if how == "command":
        return refused(capsys, short(POLICY, tmp_path/"own", tmp_path/"out"), tmp_path/"out",
                       "reward_model_name_or_path", "is an adapter")
    try: trainer = trainer_for(tmp_path/"out", reward=str(tmp_path/"own"))
    except ValueError as e:
        assert "reward_funcs" in str(e) and "\n" not in str(e)
        return
    expected = RewardModel(adapted().merge_and_unload(), AutoTokenizer.from_pretrained(REWARD))(*PAIR)
    assert trainer.reward_funcs[0](*PAIR) == pytest.approx(expected, abs=1e-5)


def test_the_advice_for_such_an_adapter_fits_a_reward(tmp_path):
    "A reward model has no peft_path."
    adapted().save_pretrained(tmp_path/"own")
    with pytest.raises(ValueError, match="merge it") as error: trainer_for(tmp_path/"out", reward=str(tmp_path/"own"))
    assert "peft_path" not in str(error.value)


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
@pytest.mark.parametrize("size", [1, 2, 3, 16])
def test_scores_in_batches_of_any_size(name, size):
    reward = RewardModel(classifier(name), tokenizer("pairs"), batch_size=size)
    questions = [f"{q} {i}" for i in range(3) for q in QUESTIONS]
    together = reward(questions, ANSWERS * 3)
    alone = [reward([q], [a])[0] for q, a in zip(questions, ANSWERS * 3)]
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_an_answer_that_ends_with_the_pad_token(name):
    "A decoder's score is read at the last token that is no pad."
    tok = tokenizer("text", "pad_token", "unk_token", "bos_token") # EOS pads
    model = classifier(name)
    reward = RewardModel(model, tok)
    found = reward(["What now?", "Hi there"], ["Rest.</s>", "No</s></s>"])
    alone = [reward([q], [a])[0] for q, a in zip(["What now?", "Hi there"], ["Rest.</s>", "No</s></s>"])]
    assert found == pytest.approx(alone, abs=1e-4)
