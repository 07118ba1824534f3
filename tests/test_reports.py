"""Situations that people reported to the trackers of TRL, peft, transformers and LLaMA-Factory, tried here."""
import json

import pytest
import torch
from architectures import classifier, decoder
from datasets import Dataset
from kit import length
from peft import LoraConfig, PeftModel, get_peft_model
from test_cases import REWARD, SMALL, TURNS, saved, tokenizer
from test_cli import run, short
from test_user_input import ASK, NAMES, QUIET, refused, tokenizer_with
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_nb.config import PPOConfig
from rlhf_nb.data import DataArguments, chat_prompt, encode_prompt, load_prompts, normalise, preparer
from rlhf_nb.models import load_policy, merge_adapter
from rlhf_nb.rewards import RewardModel
from rlhf_nb.testing import policy_tokenizer
from rlhf_nb.trainer import PPOTrainer

IDS = torch.arange(5, 30)[None]
KIND = dict(r=4, init_lora_weights=False, task_type="CAUSAL_LM")


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path/"base", LlamaConfig(vocab_size=len(tokenizer()), eos_token_id=2, pad_token_id=3, **SMALL))


@torch.no_grad()
def logits(lm): return lm(input_ids=IDS).logits


def two_adapters(base):
    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["q_proj"], **KIND),
                           adapter_name="sft")
    model.add_adapter("ppo", LoraConfig(target_modules=["v_proj"], modules_to_save=["lm_head"], **KIND))
    model.set_adapter("ppo")
    return model


def test_adapters_on_other_layers_of_which_one_is_active(base, tmp_path): # peft 1303, 1059
    args = PPOConfig(str(tmp_path/"out"), per_device_train_batch_size=4, max_completion_length=8, max_steps=1,
                     learning_rate=1e-2, **QUIET)
    trainer = PPOTrainer(two_adapters(base), length, args, Dataset.from_dict(dict(prompt=NAMES)),
                         processing_class=tokenizer())
    start = logits(trainer.policy.lm)
    before = {name: p.clone() for name, p in trainer.policy.lm.named_parameters() if "sft" in name.split(".")}
    trainer.train()
    trainer.save_model()
    now, end = dict(trainer.policy.lm.named_parameters()), logits(trainer.policy.lm)
    assert before and all(torch.equal(p, now[name]) for name, p in before.items())
    with trainer.policy.as_reference(): assert torch.equal(logits(trainer.policy.lm), start)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path/"out")
    assert (logits(again) - end).abs().max() < 1e-4 < (start - end).abs().max()


def test_several_active_adapters(base): # peft 2749, 3723
    model = two_adapters(base)
    model.base_model.set_adapter(["sft", "ppo"])
    with pytest.raises(ValueError, match="active adapters sft, ppo: choose one"):
        load_policy(model, PPOConfig("unused", **QUIET))


def test_an_adapter_that_transformers_has_loaded_and_another_one(base, tmp_path): # LLaMA-Factory 3084, TRL 4713
    two_adapters(base).save_pretrained(tmp_path/"sft", selected_adapters=["sft"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path/"sft"/"sft")
    with pytest.raises(ValueError, match="peft_config: transformers has put an adapter into the model"):
        load_policy(model, PPOConfig("unused", **QUIET), None, LoraConfig(r=4))


@pytest.mark.parametrize("beside", ["value_head.safetensors", "training_args.bin", "config.json"])
def test_what_trainers_leave_beside_an_adapter(beside, base, tmp_path, capsys): # LLaMA-Factory 7706, 3897
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**KIND)).save_pretrained(tmp_path/"adapter")
    (tmp_path/"adapter"/beside).write_text("{}")
    refused(capsys, short(tmp_path/"adapter", REWARD, tmp_path/"out"), "model_name_or_path", "is an adapter")


def test_a_merged_model_in_the_folder_of_an_adapter(base, tmp_path, capsys): # peft 1381
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**KIND)).save_pretrained(tmp_path/"adapter")
    refused(capsys, ["merge", "--base_model_name_or_path", base, "--peft_model_path", tmp_path/"adapter",
                     "--output_dir", tmp_path/"adapter", "--overwrite_output_dir"], "output_dir", "holds an adapter")
    assert not (tmp_path/"adapter"/"model.safetensors").exists()


@pytest.mark.parametrize("pad", [-1, 10 ** 6])
@pytest.mark.slow
def test_a_pad_beyond_the_embeddings_in_the_config(pad, base, tmp_path, capsys): # LLaMA-Factory 1206
    config = json.loads((base/"config.json").read_text()) | dict(pad_token_id=pad)
    (base/"config.json").write_text(json.dumps(config))
    flags = short(base, REWARD, tmp_path/"out", "--max_steps", 1, "--log_with", "none")
    if pad < 0: run(*flags)
    else: refused(capsys, flags, "model_name_or_path=", "cannot be loaded", "num_embeddings")


def test_embeddings_that_were_resized_in_memory_only(base, tmp_path): # peft 2415, 1457
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer()) + 8)
    get_peft_model(model, LoraConfig(**KIND, modules_to_save=["embed_tokens", "lm_head"])).save_pretrained(tmp_path/"a")
    with pytest.raises(ValueError, match="peft_model_path|is not an adapter of"):
        merge_adapter(str(base), str(tmp_path/"a"), str(tmp_path/"merged"))
    assert not (tmp_path/"merged").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_types_of_tokens_that_are_all_zero(name): # transformers 33280, 24514
    plain, typed = policy_tokenizer(size=290), policy_tokenizer(size=290)
    typed.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert not any(typed("Hi").token_type_ids)
    pairs = ["What now?", "Hi"], ["Rest.", "Drink water and rest."]
    assert RewardModel(classifier(name), typed)(*pairs) == pytest.approx(RewardModel(classifier(name), plain)(*pairs))


def test_one_bos_in_messages_and_in_their_text(): # TRL 3520, 3853
    tok = tokenizer_with(TURNS + ASK)
    tok._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tok.bos_token = "<s>"
    chat = [dict(role="user", content="Hi")]
    assert encode_prompt("Hi", tok).count(1) == encode_prompt("<s>Hi", tok).count(1) == 1
    for template in (TURNS + ASK, "{{ bos_token }}" + TURNS + ASK):
        tok.chat_template = template
        assert encode_prompt(chat, tok) == encode_prompt(chat_prompt(chat, tok), tok)
        assert encode_prompt(chat, tok).count(1) == 1


@pytest.mark.slow
def test_a_generation_config_that_cannot_be_saved(base, tmp_path): # transformers 29988, LLaMA-Factory 2545
    config = dict(do_sample=False, temperature=.6, top_p=.9, eos_token_id=2, pad_token_id=3)
    (base/"generation_config.json").write_text(json.dumps(config))
    run(*short(base, REWARD, tmp_path/"out", "--use_peft", False, "--max_steps", 1, "--log_with", "none"))
    AutoModelForCausalLM.from_pretrained(tmp_path/"out")


def test_a_column_called_history_that_is_text():
    row = dict(instruction="What now?", history="No earlier illness", system={"os": "linux"})
    assert normalise(row) == [dict(role="user", content="What now?")]




BEGUN = [dict(role="user", content="Hi"), dict(role="assistant", content="Sure thing. " * 80)]


def test_the_beginning_of_an_answer_that_is_too_long(tmp_path):
    (tmp_path/"data.jsonl").write_text(json.dumps(dict(prompt=BEGUN)))
    tok = tokenizer_with(TURNS + ASK)
    args = DataArguments(train_file_dir=str(tmp_path), validation_split_percentage=0, prompt_template="chat")
    prompt = load_prompts(args, tok, 96)["train"][0]["prompt"]
    assert prompt.startswith("[user] H") and prompt.endswith("Sure thing. ")
    assert 80 < len(tok(prompt).input_ids) <= 96
    tok = policy_tokenizer(size=290)
    tok.chat_template = TURNS
    reward = RewardModel(classifier("llama"), tok)
    assert len(reward([BEGUN], ["yes"])) == 1


def test_messages_without_content():
    talk = [dict(role="user", content="Hi"), dict(role="assistant", tool_calls=[]), dict(role="tool", content="5")]
    tok = policy_tokenizer(size=290)
    tok.chat_template = TURNS
    reward = RewardModel(classifier("llama"), tok)
    assert len(reward([talk], ["yes"])) == 1


@pytest.mark.parametrize("tools", ["hammer", 3, dict(a=1)])
def test_a_column_called_tools_beside_prompts_that_are_text(tools, tmp_path):
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=2, max_completion_length=4, max_steps=1, **QUIET)
    rows = Dataset.from_list([dict(prompt=name, tools=tools) for name in NAMES])
    trainer = PPOTrainer(str(REWARD.parent/"policy"), length, args, rows, peft_config=LoraConfig(r=4))
    trainer.train()
    assert trainer.state.global_step == 1


def test_weights_and_an_adapter_in_one_folder(base, tmp_path, capsys):
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**KIND)).save_pretrained(base)
    refused(capsys, short(base, REWARD, tmp_path/"out"), "model", "has an adapter beside its weights")


@pytest.mark.parametrize("excluded", [["q_proj"], "(model.)?model.layers.0.mamba.in_proj", None])
def test_all_linear_layers_but_some(excluded):
    config = LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
    policy = load_policy(decoder("jamba"), PPOConfig("unused", **QUIET), None, config)
    adapted = {name for name, m in policy.lm.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert adapted and not any(name.endswith("q_proj") for name in adapted) or excluded != ["q_proj"]
    assert ("model.layers.0.mamba.in_proj" in adapted) == (excluded in (["q_proj"], None))


def test_a_model_with_few_tokens():
    lm = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=10, **SMALL))
    with pytest.raises(ValueError, match="LoraConfig: peft cannot add it to this model .IndexError"):
        load_policy(lm, PPOConfig("unused", **QUIET), None, LoraConfig(r=2))


def test_a_reward_model_reads_the_whole_answer_where_the_prompt_begins_it():
    reward = RewardModel(classifier("llama"), policy_tokenizer(size=290))
    user, begun = dict(role="user", content="Why?"), dict(role="assistant", content="Sure, ")
    for reward.tokenizer.chat_template in (None, TURNS, "{% if messages|length > 2 %}{{ 1 // 0 }}{% endif %}" + TURNS):
        assert reward([[user, begun]], ["it is."]) == reward([[user]], ["Sure, it is."])


def test_a_long_beginning_of_an_answer_leaves_the_question():
    tok = tokenizer_with(TURNS + ASK)
    talk = [dict(role="user", content="What helps?"), dict(role="assistant", content="b " * 300)]
    row = preparer("chat", None, tok, 96)(dict(prompt=talk), "row")
    assert row["prompt"].startswith("[user] What helps?\n[assistant]") and row["question"] == "What helps?"


def test_embeddings_of_another_size_are_not_made_random(base):
    config = json.loads((base/"config.json").read_text()) | dict(vocab_size=700)
    (base/"config.json").write_text(json.dumps(config))
    args = PPOConfig("unused", model_init_kwargs=dict(ignore_mismatched_sizes=True), **QUIET)
    with pytest.raises(ValueError, match="has no weights for .*embed_tokens.* they would be random"):
        load_policy(str(base), args)


def test_merging_with_a_tokenizer_of_more_tokens(base, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**KIND))
    model.save_pretrained(tmp_path/"adapter")
    tok = tokenizer()
    tok.add_tokens(["helps", "add"])
    tok.save_pretrained(tmp_path/"adapter")
    merge_adapter(str(base), str(tmp_path/"adapter"), str(tmp_path/"merged"))
    assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path/"merged")) - logits(model)).abs().max() < 1e-4
