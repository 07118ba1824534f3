"Inputs of users that once failed: models, tokenizers, data and rewards of kinds that nobody had tried."
import csv
import json
import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from kit import length
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_cli import run, short
from test_wrong_calls import refused
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma3nTextConfig,
    LlamaConfig,
    Qwen3MoeConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

from rlhf_nb.clinic import CLINIC
from rlhf_nb.config import DataArguments, PPOConfig
from rlhf_nb.data import encode_prompt, load_prompts
from rlhf_nb.models import ActorCritic, Sampling, Tokens
from rlhf_nb.rewards import RewardModel
from rlhf_nb.trainer import PPOTrainer

POLICY, REWARD = CLINIC/"policy", CLINIC/"reward"
TURNS = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
SMALL = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96)


def tokenizer(**changes): return AutoTokenizer.from_pretrained(POLICY, **changes)


def saved(folder, config, auto=AutoModelForCausalLM):
    "A random model and the clinic's tokenizer."
    auto.from_config(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def train(out, policy=POLICY, reward=REWARD, *more, data=None):
    data = ["--train_file_dir", data, "--validation_split_percentage", 0] if data else []
    run(*short(policy, reward, out, "--max_steps", 1, "--log_with", "none", *data, *more))


def trainer_for(out, prompts=("Help", "What now?", "x", "Cold"), reward=length, **settings):
    given = dict(per_device_train_batch_size=4, max_steps=2, max_completion_length=8, learning_rate=1e-2,
                 report_to="none", disable_tqdm=True, bf16=False) | settings
    return PPOTrainer(str(POLICY), reward, PPOConfig(str(out), **given), Dataset.from_dict(dict(prompt=list(prompts))),
                      peft_config=LoraConfig(r=4))


def test_lora_on_a_model_that_changes_outputs_in_place():
    config = Gemma3nTextConfig(
        vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=3, head_dim=16, sliding_window=8,
        vocab_size_per_layer_input=300, hidden_size_per_layer_input=16, num_kv_shared_layers=2, laurel_rank=8,
        altup_num_inputs=2, activation_sparsity_pattern=[0.] * 5,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention", "full_attention"],
        **SMALL | dict(num_hidden_layers=5, intermediate_size=[96] * 5))
    lm = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=4, target_modules="all-linear"))
    ids = torch.randint(5, 300, (2, 6))
    policy = ActorCritic(lm)
    policy(Tokens(ids, torch.ones_like(ids), ids, torch.ones_like(ids)), Sampling()).logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in lm.parameters() if p.grad is not None)


def test_experts_with_the_defaults_of_the_command_line(tmp_path):
    config = Qwen3MoeConfig(vocab_size=len(tokenizer()), head_dim=16, num_experts=4, num_experts_per_tok=2,
                            moe_intermediate_size=32, **SMALL)
    train(tmp_path/"out", saved(tmp_path/"policy", config))
    assert json.loads((tmp_path/"out"/"adapter_config.json").read_text())["lora_dropout"] == 0


@pytest.mark.parametrize("config", [RobertaConfig, XLMRobertaConfig])
def test_positions_that_begin_after_the_padding(config, tmp_path):
    tok = tokenizer(padding_side="right")
    model = AutoModelForSequenceClassification.from_config(config(
        vocab_size=len(tok), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=1, max_position_embeddings=66, pad_token_id=tok.pad_token_id, type_vocab_size=1))
    reward = RewardModel(model, tok)
    assert reward.max_length == 66 - tok.pad_token_id - 1
    assert len(reward(["What now? " * 40], ["Walk a little. " * 40])) == 1


def test_a_reward_model_without_its_head_is_refused(tmp_path, capsys):
    at = saved(tmp_path/"reward", LlamaConfig(vocab_size=len(tokenizer()), num_labels=1, pad_token_id=3, **SMALL),
               AutoModelForSequenceClassification)
    weights = load_file(at/"model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, at/"model.safetensors", metadata=dict(format="pt"))
    config = json.loads((at/"config.json").read_text()) | dict(architectures=["RewardModel"])
    (at/"config.json").write_text(json.dumps(config))
    refused(capsys, short(POLICY, at, tmp_path/"out"), tmp_path/"out", "no weights for score.weight")


def test_columns_with_the_names_of_a_rewards_arguments(tmp_path):
    rows = [dict(instruction=f"What about {i}?", completions=["a"], prompts="b", completion_ids=[1], trainer_state=2)
            for i in range(4)]
    (tmp_path/"data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(tmp_path/"out", data=tmp_path/"data.jsonl")


def add(at, **special):
    tok = AutoTokenizer.from_pretrained(at)
    if special: tok.add_special_tokens(special)
    else: tok.add_tokens(["diabetes"])
    tok.save_pretrained(at)


@pytest.mark.parametrize("change, told", [
    (lambda at: add(at, pad_token="[PAD]"), None),
    (lambda at: add(at), "'diabetes' is token .*, and the model has embeddings for"),
    (lambda at: add(at, eos_token="<|end|>"), None),
    (lambda at: (at/"generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 50256]))), None),
], ids=["pad", "word", "eos", "foreign eos"])
def test_tokens_beyond_the_model(change, told, tmp_path, capsys):
    shutil.copytree(POLICY, tmp_path/"policy")
    change(tmp_path/"policy")
    (tmp_path/"data.txt").write_text("What helps against diabetes?\nMy son has a cold\nHelp\nI have had swollen legs\n")
    if told is None: return train(tmp_path/"out", tmp_path/"policy", data=tmp_path/"data.txt")
    with pytest.raises(SystemExit) as stop: train(tmp_path/"out", tmp_path/"policy", data=tmp_path/"data.txt")
    assert stop.value.code == 2
    assert re.search(told, capsys.readouterr().err)


CODE = """
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

class OwnForCausalLM(LlamaPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def get_output_embeddings(self): return self.lm_head
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
                inputs_embeds=None, labels=None, output_attentions=None, output_hidden_states=None, return_dict=None):
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                         past_key_values=past_key_values, use_cache=use_cache)
        return CausalLMOutputWithPast(logits=self.lm_head(out[0]), past_key_values=out.past_key_values)
"""


def test_code_that_comes_with_a_model_and_is_older_than_logits_to_keep(tmp_path):
    at = saved(tmp_path/"policy", LlamaConfig(vocab_size=len(tokenizer()), bos_token_id=1, eos_token_id=2,
                                              pad_token_id=3, tie_word_embeddings=False, **SMALL))
    (at/"modeling_own.py").write_text(CODE)
    own = dict(architectures=["OwnForCausalLM"], auto_map=dict(AutoModelForCausalLM="modeling_own.OwnForCausalLM"))
    (at/"config.json").write_text(json.dumps(json.loads((at/"config.json").read_text()) | own))
    train(tmp_path/"out", at, REWARD, "--trust_remote_code", True)


@pytest.mark.parametrize("setting, auto, layer", [
    ("model_name_or_path", AutoModelForCausalLM, "query_key_value"),
    ("reward_model_name_or_path", AutoModelForSequenceClassification, "query_proj"),
])
def test_a_folder_with_an_adapter_only(setting, auto, layer, tmp_path, capsys):
    base = POLICY if auto is AutoModelForCausalLM else REWARD
    get_peft_model(auto.from_pretrained(base), LoraConfig(r=4, target_modules=[layer])).save_pretrained(tmp_path/"own")
    both = dict(model_name_or_path=POLICY, reward_model_name_or_path=REWARD) | {setting: tmp_path/"own"}
    refused(capsys, short(*both.values(), tmp_path/"out"), tmp_path/"out", setting, "is an adapter")


def test_a_reward_with_an_adapter_scores_as_merged(tmp_path):
    tok = AutoTokenizer.from_pretrained(REWARD)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(REWARD),
                           LoraConfig(r=4, target_modules=["query_proj"], init_lora_weights=False, task_type="SEQ_CLS"))
    pair = ["What helps?"], ["Rest a day."]
    assert isinstance(model, PeftModel)
    found = RewardModel(model, tok)(*pair)
    assert found == pytest.approx(RewardModel(model.merge_and_unload(), tok)(*pair), abs=1e-5)


@pytest.mark.parametrize("scores", [[1.], [1., 2., 3.], [1.] * 5, torch.arange(4.)[:, None]])
def test_a_wrong_number_of_scores_moves_nothing(scores, tmp_path):
    trainer = trainer_for(tmp_path, log_completions=True)
    rollout = trainer.rollout(["Help", "What now?", "x", "Cold"])
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    with pytest.raises(ValueError, match="4 completions"): trainer.step(rollout, scores)
    assert all(map(torch.equal, before, trainer.policy.parameters()))


def test_the_beginning_of_an_answer_is_continued():
    tok = tokenizer()
    tok.chat_template = TURNS.replace("\n", "</s>") + "{% if add_generation_prompt %}[assistant] {% endif %}"
    prompt = [dict(role="user", content="Help?"), dict(role="assistant", content="Let me think.")]
    assert tok.decode(encode_prompt(prompt, tok)) == "[user] Help?</s>[assistant] Let me think."


SAID = [{"from": "human", "value": "What now?"}, {"from": "gpt", "value": "Rest."}]


@pytest.mark.parametrize("row", [
    dict(conversations=SAID, system="You are a nurse."),
    dict(conversations=SAID, system_prompt="You are a nurse."),
    dict(instruction="What now?", input="", system="You are a nurse."),
    dict(instruction="What now?", input="", history=[["You are a nurse.", "Yes."]]),
])
def test_system_and_history_of_a_row_are_in_its_prompt(row, tmp_path):
    tok = tokenizer()
    tok.chat_template = TURNS + "{% if add_generation_prompt %}[assistant] {% endif %}"
    (tmp_path/"data.jsonl").write_text(json.dumps(row))
    args = DataArguments(train_file_dir=str(tmp_path), prompt_template="chat", validation_split_percentage=0)
    prompt = load_prompts(args, tok, 64)["train"][0]["prompt"]
    assert "You are a nurse." in prompt and prompt.endswith("[user] What now?\n[assistant] ")


TEXTS = [f"What about {i}?" for i in range(4)]
STRANGE = {
    "uint64.parquet": pa.table(dict(instruction=TEXTS, strange=pa.array([2**63 + 1] * 4, pa.uint64()))),
    "map.parquet": pa.table(dict(instruction=TEXTS,
                                 strange=pa.array([[("a", 1)]] * 4, pa.map_(pa.string(), pa.int64())))),
    "mixed.jsonl": [dict(instruction=t, strange=[1] if i % 2 else "x") for i, t in enumerate(TEXTS)],
    "ids.jsonl": [dict(instruction=t, strange=i if i % 2 else f"seed_{i}") for i, t in enumerate(TEXTS)],
    "large.jsonl": [dict(instruction=t, strange=2**70) for t in TEXTS],
}


@pytest.mark.parametrize("name", STRANGE)
def test_columns_that_cannot_be_stored_are_left_out(name, tmp_path, caplog):
    file, data = tmp_path/name, STRANGE[name]
    if name.endswith("parquet"): pq.write_table(data, file)
    else: file.write_text("\n".join(map(json.dumps, data)))
    rows = load_prompts(DataArguments(train_file_dir=str(file), validation_split_percentage=0))["train"]
    assert len(rows) == 4 and ("strange" in rows.column_names or "the column strange is left out" in caplog.text)


def test_a_card_without_an_example_does_not_end_a_run(tmp_path):
    tok = tokenizer()
    tok.chat_template = ("{% if messages[0]['role'] != 'system' %}{{ raise_exception('system must come first') }}"
                         "{% endif %}" + TURNS + "[assistant] ")
    rows = [dict(prompt=[dict(role="system", content="Be kind."), dict(role="user", content="Help?")])] * 2
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=2, max_steps=1, max_completion_length=8, bf16=False,
                     report_to="none", disable_tqdm=True)
    trainer = PPOTrainer(str(POLICY), lambda completions, **_: [0.] * len(completions), args, Dataset.from_list(rows),
                         processing_class=tok, peft_config=LoraConfig(r=4))
    trainer.train()
    trainer.save_model()
    assert (tmp_path/"README.md").is_file()


def test_a_csv_field_of_any_length(tmp_path):
    with (tmp_path/"long.csv").open("w") as file:
        csv.writer(file).writerows([["instruction", "input"], *([f"{i} " + "word " * 40_000, ""] for i in range(3))])
    assert len(load_prompts(DataArguments(train_file_dir=str(tmp_path), validation_split_percentage=0))["train"]) == 3


def with_template(folder, template):
    shutil.copytree(POLICY, folder)
    tok = AutoTokenizer.from_pretrained(folder)
    tok.chat_template = template
    tok.save_pretrained(folder)
    return folder


def test_a_template_that_fails_or_refuses_empty_messages(tmp_path, capsys):
    rows = [dict(conversations=[{"from": "human", "value": text}]) for text in ("What now? " * 300, "Help? " * 300)]
    (tmp_path/"talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--prompt_template", "chat", "--train_file_dir", tmp_path/"talk.jsonl", "--validation_split_percentage", 0]
    fails = with_template(tmp_path/"fails", "{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}")
    refused(capsys, short(fails, REWARD, tmp_path/"out", *flags), tmp_path/"out", "the chat template refuses it")
    strict = ("{% for m in messages %}{% if not m['content'] %}{{ raise_exception('no content') }}{% endif %}"
              "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] ")
    train(tmp_path/"good", with_template(tmp_path/"strict", strict), REWARD, *flags)
