"""More of what users hand in: further members of each kind in test_cases.py."""
import io
import json
import logging
import math
import re
import shutil
from datetime import date
from decimal import Decimal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from architectures import CLASSIFIERS, DECODERS, classifier, decoder
from datasets import Dataset, IterableDataset
from kit import length
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from test_architectures import SAMPLING, sample
from test_cases import CODE, POLICY, REWARD, SAID, SMALL, TEXTS, TURNS, saved, tokenizer, train, trainer_for
from test_cases import with_template as policy_with_template
from test_cli import run, short
from test_rewards import rolled
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    TrainerCallback,
)

from rlhf_nb.config import DataArguments, PPOConfig
from rlhf_nb.data import load_prompts, preparer
from rlhf_nb.models import ActorCritic, add_adapter, check_rows, load_policy, lora_targets
from rlhf_nb.rewards import RewardModel, Rewards, Scores, as_reward, fit_pair
from rlhf_nb.testing import policy_tokenizer, tiny_reward_model
from rlhf_nb.trainer import PPOTrainer

ASK = "{% if add_generation_prompt %}[assistant] {% endif %}"
QUIET = dict(report_to="none", disable_tqdm=True, bf16=False, use_cpu=True)
NAMES = ["Help", "What now?", "x", "Cold"]


def refused(capsys, flags, *texts):
    "Status 2 and one line with these texts, which is no traceback and no error that nobody expected."
    with pytest.raises(SystemExit) as stop: run(*flags)
    said = capsys.readouterr().err
    line = said.strip().splitlines()[-1]
    assert stop.value.code == 2 and "Traceback" not in said and "--debug shows where" not in said, said
    assert all(text in line for text in texts), said


def prompts_of(at, **settings):
    settings = dict(train_file_dir=str(at), validation_split_percentage=0) | settings
    return load_prompts(DataArguments(**settings), tokenizer_with(TURNS + ASK), 96)["train"]


def tokenizer_with(template):
    tok = tokenizer()
    tok.chat_template = template
    return tok


# 04: outputs that are changed in place

@pytest.mark.parametrize("config", [
    LoraConfig(r=4, target_modules="all-linear", use_dora=True), LoraConfig(r=4, target_modules="all-linear"),
    IA3Config(target_modules=["q_proj", "linear_left"], feedforward_modules=[]),
    LoHaConfig(r=4, target_modules=["linear_left", "altup.correction_coefs"]),
], ids=["dora", "lora", "ia3", "loha"])
@pytest.mark.slow
def test_any_adapter_on_a_model_that_changes_outputs_in_place(config):
    policy = load_policy(decoder("gemma3n_text"), PPOConfig("unused", **QUIET), None, config)
    tokens, _ = sample(policy)
    policy(tokens, SAMPLING).logprobs.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.lm.parameters() if p.grad is not None)


# 05: dropout of LoRA on parameters that hold experts

EXPERTS = """mixtral olmoe deepseek_v3 glm4_moe minimax granitemoe jetmoe gpt_oss qwen2_moe dbrx ernie4_5_moe
    granitemoeshared hunyuan_v1_moe lfm2_moe phimoe llama4_text qwen3_next flex_olmo""".split()


@pytest.mark.parametrize("name", [name for name in EXPERTS if name in DECODERS])
@pytest.mark.slow
def test_dropout_of_lora_is_no_reason_to_refuse_experts(name):
    model = add_adapter(decoder(name), LoraConfig(r=4, lora_dropout=.05, task_type="CAUSAL_LM"))
    check_rows(ActorCritic(model))


def test_dropout_of_lora_on_parameters_that_the_user_names():
    config = LoraConfig(r=4, lora_dropout=.05, target_parameters=["mlp.down_proj.weight"], target_modules=["q_proj"])
    load_policy(decoder("llama"), PPOConfig("unused", **QUIET), None, config)


# 09: as many positions as the model has

@pytest.mark.parametrize("name", [name for name in """camembert data2vec-text xlm-roberta-xl roberta-prelayernorm xmod
    ibert mpnet esm luke markuplm layoutlmv3 lilt bert gpt2 opt electra nystromformer""".split()
                                  if name in CLASSIFIERS])
@pytest.mark.parametrize("claim", [10**30, 512])
@pytest.mark.slow
def test_a_long_pair_is_cut_to_the_positions_of_the_model(name, claim):
    tok = policy_tokenizer(size=290)
    tok.model_max_length = claim
    reward = RewardModel(classifier(name), tok)
    scores = reward(["What now? " * 400, "Help"], ["Walk a little. " * 400, "Rest."])
    assert len(scores) == 2 and all(map(math.isfinite, scores))


@pytest.mark.parametrize("folder", [POLICY, REWARD])
def test_a_pair_is_never_longer_than_it_may_be(folder):
    tok = AutoTokenizer.from_pretrained(folder)
    for most in range(20, 40):
        assert len(fit_pair("What now? " * 40, "Walk a little. " * 40, tok, most).input_ids) <= most


@pytest.mark.parametrize("most", range(20, 30))
def test_a_prompt_is_never_longer_than_it_may_be(most):
    ready = preparer("{}", None, tok := tokenizer(), most)
    assert len(tok(ready(dict(prompt="What now? " * 40), "row")["prompt"]).input_ids) <= most


# 10: weights that are not those of the model

def renamed(folder, rename):
    weights = load_file(folder/"model.safetensors")
    save_file({rename(name): x for name, x in weights.items()}, folder/"model.safetensors", metadata=dict(format="pt"))


@pytest.mark.parametrize("rename", [
    lambda name: f"pretrained_model.{name}", lambda name: name.replace("layers.1.", "layers.7."),
    lambda name: name.replace("lm_head", "embed_out"),
], ids=["wrapped", "a layer", "head"])
def test_a_policy_without_some_of_its_weights_is_refused(rename, tmp_path, capsys):
    at = saved(tmp_path/"policy", LlamaConfig(vocab_size=len(tokenizer()), bos_token_id=1, eos_token_id=2,
                                              pad_token_id=3, tie_word_embeddings=False, **SMALL))
    renamed(at, rename)
    refused(capsys, short(at, REWARD, tmp_path/"out", "--max_steps", 1, "--log_with", "none"), "no weights for")


def saved_reward(folder, **more):
    config = LlamaConfig(vocab_size=len(tokenizer()), **dict(num_labels=1, pad_token_id=3) | SMALL | more)
    return saved(folder, config, AutoModelForSequenceClassification)


def test_a_reward_model_whose_body_has_other_names_is_refused(tmp_path, capsys):
    at = saved_reward(tmp_path/"reward")
    renamed(at, lambda name: name.replace("model.", "transformer."))
    refused(capsys, short(POLICY, at, tmp_path/"out"), "no weights for", "reward")


@pytest.mark.parametrize("part", ["policy", "reward"])
def test_weights_of_another_shape_are_refused(part, tmp_path, capsys):
    at = saved_reward(tmp_path/"reward", num_labels=2) if part == "reward" else saved(
        tmp_path/"policy", LlamaConfig(vocab_size=len(tokenizer()), eos_token_id=2, pad_token_id=3, **SMALL))
    config = json.loads((at/"config.json").read_text())
    change = dict(num_labels=1, id2label={0: "good"}, label2id=dict(good=0))
    if part == "policy": change = dict(intermediate_size=48)
    (at/"config.json").write_text(json.dumps(config | change))
    models = (POLICY, at) if part == "reward" else (at, REWARD)
    refused(capsys, short(*models, tmp_path/"out"), f"{part}", "no weights for", "of another shape")


def test_a_value_head_of_another_shape_is_refused(tmp_path, capsys):
    shutil.copytree(POLICY, tmp_path/"policy")
    save_file({"weight": torch.zeros(1, 7), "bias": torch.zeros(1)}, tmp_path/"policy"/"value_head.safetensors")
    refused(capsys, short(tmp_path/"policy", REWARD, tmp_path/"out"), "value_head")


# 11: columns with names that mean something

@pytest.mark.slow
def test_columns_with_any_name_that_is_used_inside(tmp_path):
    names = "completion self func args kwargs log_extra log_metric columns _cut output question reward row".split()
    rows = [dict(instruction=text, **{name: [1] for name in names}) for text in TEXTS]
    (tmp_path/"data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train(tmp_path/"out", data=tmp_path/"data.jsonl")


def test_a_reward_function_gets_its_own_arguments():
    seen = []

    def reward(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        seen.append((completions, callable(log_extra), callable(log_metric), "other" in columns, trainer_state))
        return [0.] * len(prompts)

    data = rolled(TEXTS, ["a"] * 4)
    for row in data.rows: row.update(completions="x", log_extra=1, log_metric=2, trainer_state=3, other=4)
    Rewards(reward, None, PPOConfig("unused", **QUIET))(data, "state")
    assert seen == [(["a"] * 4, True, True, True, "state")]


@pytest.mark.parametrize("column", [dict(tools="a hammer"), dict(tools="[1, 2]"), dict(chat_template_kwargs="none")])
def test_columns_that_chat_templates_read_and_that_are_something_else(column, tmp_path, capsys):
    (tmp_path/"data.jsonl").write_text(json.dumps(dict(instruction="What now?") | column))
    at = policy_with_template(tmp_path/"policy", TURNS + "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + ASK)
    flags = ["--prompt_template", "chat", "--train_file_dir", tmp_path/"data.jsonl",
             "--validation_split_percentage", 0, "--max_steps", 1, "--log_with", "none"]
    try: run(*short(at, REWARD, tmp_path/"out", *flags))
    except SystemExit: assert re.search(f"data.jsonl:1: .*{[*column][0]}", capsys.readouterr().err, re.I)


# 12: ids beyond the model

@pytest.mark.slow
def test_an_eos_beyond_the_model_and_a_minimum_length(tmp_path):
    shutil.copytree(POLICY, tmp_path/"policy")
    (tmp_path/"policy"/"generation_config.json").write_text(json.dumps(dict(eos_token_id=[2, 50256, -1])))
    train(tmp_path/"out", tmp_path/"policy", REWARD, "--min_target_length", 2)


@pytest.mark.parametrize("special", [dict(pad_token="<|pad|>"), dict(sep_token="<|sep|>"), {}],
                         ids=["pad", "separator", "word"])
def test_the_tokenizer_of_a_reward_model_has_more_tokens_than_it(special):
    model, tok = AutoModelForSequenceClassification.from_pretrained(REWARD), AutoTokenizer.from_pretrained(REWARD)
    known = model.get_input_embeddings().weight.shape[0]
    tok.add_special_tokens(special)
    if not special: tok.add_tokens(["diabetes"])
    assert len(tok) > known
    try: assert len(RewardModel(model, tok)(["What helps?", "Help"], ["diabetes, a little every day.", "No"])) == 2
    except ValueError as e: assert re.search("is token .* model has embeddings for", str(e))


def test_a_completion_to_imitate_has_tokens_beyond_the_model(tmp_path):
    tok = tokenizer()
    tok.add_tokens(["diabetes"])
    rows = [dict(prompt=name, output="It is diabetes") for name in NAMES]
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=4, max_completion_length=8, ptx_coef=.1, max_steps=1,
                     **QUIET)
    trainer = PPOTrainer(str(POLICY), length, args, Dataset.from_list(rows), processing_class=tok,
                         peft_config=LoraConfig(r=4))
    with pytest.raises(ValueError, match="'diabetes' is token .*, and the model has embeddings for"): trainer.train()


def test_a_question_to_a_model_has_tokens_beyond_it(tmp_path, capsys, monkeypatch):
    train(tmp_path/"out")
    tok = AutoTokenizer.from_pretrained(tmp_path/"out")
    tok.add_tokens(["diabetes"])
    tok.save_pretrained(tmp_path/"out")
    monkeypatch.setattr("sys.stdin", io.StringIO("diabetes\n"))
    refused(capsys, ["chat", tmp_path/"out"], "'diabetes' is token", "the model has embeddings for")


# 13: prompt learning

VIRTUAL = [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig]


@pytest.fixture(scope="module")
def virtual(tmp_path_factory):
    at = tmp_path_factory.mktemp("virtual")
    config = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(POLICY), config).save_pretrained(at)
    tokenizer().save_pretrained(at)
    return at


@pytest.mark.parametrize("kind", VIRTUAL)
def test_a_policy_that_has_virtual_tokens_already(kind):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(POLICY), kind(num_virtual_tokens=4,
                                                                             task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="virtual tokens are not supported"):
        load_policy(model, PPOConfig("unused", **QUIET))


@pytest.mark.parametrize("command", ["train", "chat", "merge"])
def test_a_saved_prompt_is_no_adapter_of_layers(command, virtual, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What now?\n"))
    flags = dict(
        train=short(POLICY, REWARD, tmp_path/"out", "--peft_path", virtual), chat=["chat", virtual],
        merge=["merge", "--base_model_name_or_path", POLICY, "--peft_model_path", virtual, "--output_dir",
               tmp_path/"out"])
    refused(capsys, flags[command], "virtual tokens are not supported")
    assert not (tmp_path/"out").exists()


# 14: code that comes with a model

def own_model(at, code):
    at = saved(at, LlamaConfig(vocab_size=len(tokenizer()), bos_token_id=1, eos_token_id=2, pad_token_id=3,
                               tie_word_embeddings=False, **SMALL))
    (at/"modeling_own.py").write_text(code)
    own = dict(architectures=["OwnForCausalLM"], auto_map=dict(AutoModelForCausalLM="modeling_own.OwnForCausalLM"))
    (at/"config.json").write_text(json.dumps(json.loads((at/"config.json").read_text()) | own))
    return at


def without(code, *arguments):
    for name in arguments:
        code = code.replace(f" {name}=None,", "").replace(f", {name}={name}", "").replace(f"{name}={name}, ", "")
        code = code.replace(f"{name}={name}", "")
    return code


@pytest.mark.parametrize("arguments", [
    ["position_ids"], ["use_cache"], ["past_key_values", "use_cache"],
    ["output_attentions", "output_hidden_states", "inputs_embeds", "labels"],
], ids=" ".join)
@pytest.mark.slow
def test_code_whose_forward_takes_less(arguments, tmp_path, capsys):
    at = own_model(tmp_path/"policy", without(CODE, *arguments))
    try: train(tmp_path/"out", at, REWARD, "--trust_remote_code", True)
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and any(name in said for name in arguments), said


def test_code_that_answers_with_a_tuple(tmp_path, capsys):
    at = own_model(tmp_path/"policy", CODE.replace(
        "return CausalLMOutputWithPast(", "return (lambda logits, past_key_values: (logits, past_key_values))("))
    try: train(tmp_path/"out", at, REWARD, "--trust_remote_code", True)
    except SystemExit as stop:
        said = capsys.readouterr().err
        assert stop.code == 2 and "--debug shows" not in said, said


@pytest.mark.slow
def test_code_that_comes_with_a_model_is_merged_and_asked(tmp_path, monkeypatch, capsys):
    at = own_model(tmp_path/"policy", CODE)
    train(tmp_path/"out", at, REWARD, "--trust_remote_code", True)
    run("merge", "--base_model_name_or_path", at, "--peft_model_path", tmp_path/"out", "--output_dir",
        tmp_path/"merged", "--trust_remote_code", True)
    for model in ("out", "merged"):
        monkeypatch.setattr("sys.stdin", io.StringIO("What now?\n"))
        run("chat", tmp_path/model, "--base_model_name_or_path", at, "--trust_remote_code", True,
            "--max_completion_length", 4)
        assert "tuned: " in capsys.readouterr().out


# 15: a folder with an adapter only

@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    at = tmp_path_factory.mktemp("adapters")
    for part, auto, layer in (("policy", AutoModelForCausalLM, "query_key_value"),
                              ("reward", AutoModelForSequenceClassification, "query_proj")):
        base = auto.from_pretrained(POLICY if part == "policy" else REWARD)
        get_peft_model(base, LoraConfig(r=4, target_modules=[layer])).save_pretrained(at/part)
        AutoTokenizer.from_pretrained(POLICY if part == "policy" else REWARD).save_pretrained(at/part)
    return at


@pytest.mark.parametrize("command", ["merge", "chat"])
def test_an_adapter_is_no_base_of_another(command, adapters, tmp_path, capsys):
    flags = dict(merge=["merge", "--peft_model_path", adapters/"policy", "--output_dir", tmp_path/"merged"],
                 chat=["chat", adapters/"policy"])[command]
    refused(capsys, [*flags, "--base_model_name_or_path", adapters/"policy"], "base_model_name_or_path",
            "is an adapter")
    assert not (tmp_path/"merged").exists()


@pytest.mark.parametrize("part", ["model", "reward"])
@pytest.mark.slow
def test_what_is_no_adapter_of_the_policy(part, adapters, tmp_path, capsys):
    at = POLICY if part == "model" else adapters/"reward"
    refused(capsys, short(POLICY, REWARD, tmp_path/"out", "--peft_path", at), "peft_path", "adapter")


def test_an_adapter_is_no_judge(adapters, capsys, tmp_path):
    (tmp_path/"data.jsonl").write_text(json.dumps(dict(instruction="What now?")))
    refused(capsys, ["eval", adapters/"policy", "--reward_model_name_or_path", adapters/"reward",
                     "--validation_file_dir", tmp_path/"data.jsonl"], "reward", "is an adapter")


def test_an_adapter_given_to_the_trainer(adapters, tmp_path):
    data, args = Dataset.from_dict(dict(prompt=NAMES)), PPOConfig(str(tmp_path), max_completion_length=8, **QUIET)
    with pytest.raises(ValueError, match="is an adapter"): PPOTrainer(str(adapters/"policy"), length, args, data)
    with pytest.raises(ValueError, match="is an adapter"):
        PPOTrainer(str(POLICY), str(adapters/"reward"), args, data)


@pytest.mark.parametrize("part, setting", [
    ("policy", "model_name_or_path"), ("reward", "reward_model_name_or_path"),
])
def test_an_adapter_with_the_configuration_of_its_base(part, setting, adapters, tmp_path, capsys):
    shutil.copytree(adapters/part, tmp_path/"own")
    AutoConfig.from_pretrained(POLICY if part == "policy" else REWARD).save_pretrained(tmp_path/"own")
    both = dict(model_name_or_path=POLICY, reward_model_name_or_path=REWARD) | {setting: tmp_path/"own"}
    refused(capsys, short(*both.values(), tmp_path/"out"), setting, "is an adapter")


# 16: reward models that are wrapped

@pytest.mark.parametrize("more", [{}, dict(modules_to_save=["classifier", "pooler"])], ids=["lora", "head too"])
def test_a_reward_with_an_adapter_in_a_run(more, tmp_path):
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(REWARD), LoraConfig(
        r=4, target_modules=["query_proj"], init_lora_weights=False, task_type="SEQ_CLS", **more))
    trainer = trainer_for(tmp_path, reward=model, max_steps=1)
    trainer.train()
    assert "rewards/reward/mean" in trainer.state.log_history[0]


def test_a_reward_with_virtual_tokens_scores_each_pair_as_alone_or_is_refused():
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(REWARD), PromptTuningConfig(
        num_virtual_tokens=4, task_type="SEQ_CLS"))
    try: reward = RewardModel(model, AutoTokenizer.from_pretrained(REWARD))
    except ValueError: return
    questions, answers = ["What helps?", "Help"], ["Rest a day, and walk a little every day.", "No"]
    alone = [reward([q], [a])[0] for q, a in zip(questions, answers)]
    assert reward(questions, answers) == pytest.approx(alone, abs=1e-4)


def test_a_reward_in_a_wrapper_scores_as_without_it_or_is_refused():
    model, tok = AutoModelForSequenceClassification.from_pretrained(REWARD), AutoTokenizer.from_pretrained(REWARD)
    pair = ["What helps?"], ["Rest a day."]
    want = RewardModel(model, tok)(*pair)
    try: wrapped = as_reward(nn.DataParallel(model), tok, PPOConfig("unused", **QUIET), torch.device("cpu"))
    except (TypeError, ValueError) as e: assert "DataParallel" in str(e)
    else: assert wrapped(*pair) == pytest.approx(want, abs=1e-5)


# 17: scores of step

ONES = torch.ones(4)
WRONG = {
    "none": [1., None, 2., 3.], "text": ["1", 2., 3., 4.], "one number": 1., "empty": [],
    "one for all tokens": Scores(ONES, {}, per_token=torch.ones(4, 1)),
    "three rows of tokens": Scores(ONES, {}, per_token=torch.ones(3, 8)),
    "three by name": Scores(ONES, dict(f=torch.ones(3))), "one in a column": Scores(ONES, {}, extra=dict(x=[1])),
}


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_scores_of_a_wrong_kind_move_nothing(name, log, tmp_path):
    trainer = trainer_for(tmp_path, log_completions=log)
    rollout = trainer.rollout(NAMES)
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    with pytest.raises(ValueError, match="score"): trainer.step(rollout, WRONG[name])
    assert all(map(torch.equal, before, trainer.policy.parameters())) and trainer.state.global_step == 0


# 18: the beginning of an answer

BEGUN = [dict(role="user", content="Help?"), dict(role="assistant", content="Let me think.")]


def test_a_rollout_continues_the_beginning_of_an_answer(tmp_path):
    tok = tokenizer_with(TURNS.replace("\n", "</s>") + ASK)
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=2, max_completion_length=4, max_steps=1, **QUIET)
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [0.] * len(prompts)

    trainer = PPOTrainer(str(POLICY), reward, args, Dataset.from_list([dict(prompt=BEGUN)] * 2), processing_class=tok,
                         peft_config=LoraConfig(r=4))
    rollout = trainer.rollout([dict(prompt=BEGUN)] * 2)
    ids, mask = rollout.tokens.query_ids, rollout.tokens.query_mask
    assert tok.decode(ids[0][mask[0] > 0]) == "[user] Help?</s>[assistant] Let me think."
    trainer.train()
    (prompts, completions), = seen
    assert prompts == [BEGUN] * 2 and [[m["role"] for m in c] for c in completions] == [["assistant"]] * 2


@pytest.mark.parametrize("template", ["chat", "alpaca"])
def test_the_beginning_of_an_answer_in_a_file_is_kept(template, tmp_path, caplog):
    (tmp_path/"data.jsonl").write_text(json.dumps(dict(prompt=BEGUN)))
    with caplog.at_level(logging.INFO):
        prompt = prompts_of(tmp_path, prompt_template=template)[0]["prompt"]
    assert prompt.endswith("Let me think.") or "assistant" in caplog.text


def test_the_beginning_of_an_answer_is_kept_where_a_prompt_is_shortened(tmp_path):
    talk = [dict(role="user", content="Help? " * 200), *BEGUN]
    row = preparer("chat", None, tokenizer_with(TURNS + ASK), 40)(dict(prompt=talk), "row")
    assert row["prompt"].endswith("[assistant] Let me think.")


@pytest.mark.parametrize("begun, wanted", [("<think>Well", "<think>Well"), ("<think>a</think>Well", None)])
def test_a_template_that_strips_thoughts(begun, wanted, tmp_path):
    talk = [dict(role="user", content="Hi"), dict(role="assistant", content="<think>a</think>b"), *BEGUN[:1]]
    turns = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]")
    ready = preparer("chat", None, tokenizer_with(turns + ASK), 96)
    assert ready(dict(prompt=talk), "row")["prompt"].startswith("[user] Hi\n[assistant] b\n[user] Help?")
    row = dict(prompt=[*talk, dict(role="assistant", content=begun)])
    if wanted: assert ready(row, "row")["prompt"].endswith(wanted)
    else: # What the policy should continue is not in its prompt
        with pytest.raises(ValueError, match="row: the chat template refuses it .*final message"): ready(row, "row")


# 19: fields of a row that belong to its prompt

@pytest.mark.parametrize("row, word", [
    (dict(prompt="What now?", system="You are a nurse."), "system"),
    (dict(prompt=[dict(role="user", content="What now?")], system="You are a nurse."), "system"),
    (dict(prompt=[dict(role="user", content="What now?")], system_prompt="You are a nurse."), "system"),
    (dict(prompt="What now?", history=[["You are a nurse.", "Yes."]]), "history"),
    (dict(conversations=SAID, history=[["You are a nurse.", "Yes."]]), "history"),
    (dict(conversations=[{"from": "system", "value": "Be brief."}, *SAID], system="You are a nurse."), "system"),
    (dict(conversations=[{"from": "system", "value": "Be brief."}, *SAID], history=[["Nurse, nurse?", "Yes."]]),
     "history"),
    (dict(instruction="What now?", system=["You are a nurse."]), "system"),
], ids=["text", "messages", "system_prompt", "text and history", "talk and history", "two systems",
        "system and history", "a list"])
def test_what_belongs_to_a_prompt_is_in_it_or_is_said(row, word, tmp_path, caplog):
    (tmp_path/"data.jsonl").write_text(json.dumps(row))
    with caplog.at_level(logging.INFO):
        try: prompt = prompts_of(tmp_path, prompt_template="chat")[0]["prompt"]
        except ValueError as e: assert word in str(e)
        else: assert "nurse" in prompt or word in caplog.text


# 20: columns that nothing needs

def table(strange, kind=None): return pa.table(dict(instruction=TEXTS, strange=pa.array(strange, kind)))


PARQUET = dict(
    binary=table([b"\xff\x00"] * 4), decimal=table([Decimal("1.5")] * 4), date=table([date(2020, 1, 2)] * 4),
    null=table([None] * 4), nanoseconds=table([10**18 + 1] * 4, pa.timestamp("ns", "UTC")),
    duration=table([1] * 4, pa.duration("us")), dictionary=pa.table(dict(
        instruction=TEXTS, strange=pa.array(["a", "b"] * 2).dictionary_encode())),
    nested=table([dict(a=[dict(b=2**64 - 1)])] * 4, pa.struct(
        dict(a=pa.list_(pa.struct(dict(b=pa.uint64())))).items())),
    far=table([10**18] * 4, pa.timestamp("us")), half=pa.table(dict(
        instruction=TEXTS, strange=pa.array([1.5] * 4, pa.float32()).cast(pa.float16()))),
    time=table([1] * 4, pa.time64("ns")), wide=table([Decimal(10)**60] * 4, pa.decimal256(76, 0)),
    map_of_maps=table([[("a", [("b", 1)])]] * 4, pa.map_(pa.string(), pa.map_(pa.string(), pa.int64()))),
    twice=pa.Table.from_arrays([pa.array(TEXTS), pa.array([1] * 4), pa.array([2] * 4)],
                               ["instruction", "strange", "strange"]),
)
LINES = dict(
    surrogate='{"instruction": "%s", "strange": "\\ud83d"}', nan='{"instruction": "%s", "strange": NaN}',
    digits='{"instruction": "%s", "strange": ' + "1" * 5000 + "}",
    deep='{"instruction": "%s", "strange": ' + "[" * 2000 + "]" * 2000 + "}",
    empty='{"instruction": "%s", "strange": {}}', no_name='{"instruction": "%s", "strange": 1, "": 2}',
)


def write(at, name):
    if name in PARQUET: pq.write_table(PARQUET[name], at/"data.parquet")
    elif name in LINES: (at/"data.jsonl").write_text("\n".join(LINES[name] % text for text in TEXTS))
    elif name == "array.json":
        (at/"data.json").write_text(json.dumps([dict(instruction=t, strange=[[1], "x", {}, None][i])
                                                for i, t in enumerate(TEXTS)]))
    else: (at/"data.csv").write_text("instruction,,strange,strange\n" + "\n".join(f"{t},1,2,3" for t in TEXTS))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("far", "surrogate", "deep") else pytest.mark.slow)
    for name in (*PARQUET, *LINES, "array.json", "names.csv")
])
def test_a_column_that_nothing_needs_does_not_end_a_run(name, tmp_path, caplog, capsys):
    (tmp_path/"data").mkdir()
    write(tmp_path/"data", name)
    try: train(tmp_path/"out", data=tmp_path/"data")
    except SystemExit as stop:
        said = capsys.readouterr().err.strip().splitlines()[-1]
        named = "strange" in said or "data.jsonl:1: not JSON" in said # Before it is read there are no columns
        assert stop.code == 2 and named and "--debug" not in said, said


def strange_rows():
    for i, text in enumerate(TEXTS):
        yield dict(prompt=text, strange=[2**70, b"x", {"a": {1, 2}}, object()][i], **{"": 1, "completions": i})


def test_a_stream_with_columns_that_cannot_be_stored(tmp_path):
    rows = IterableDataset.from_generator(strange_rows)
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=4, max_completion_length=4, max_steps=1,
                     log_completions=True, **QUIET)
    trainer = PPOTrainer(str(POLICY), lambda completions, **_: [0.] * len(completions), args, rows,
                         peft_config=LoraConfig(r=4))
    trainer.train()
    assert trainer.state.global_step == 1 and len([*(tmp_path/"completions").iterdir()]) == 1


@pytest.mark.parametrize("values", [
    [1, "a", None, 2.], [2**70] * 4, [b"x"] * 4, [[1], "x", {}, None], [{1, 2}] * 4, [torch.ones(2)] * 4,
], ids=["mixed", "large", "bytes", "nested", "sets", "tensors"])
@pytest.mark.slow
def test_extra_columns_of_any_kind_are_kept_or_left_out(values, tmp_path):
    def reward(completions, log_extra, **columns):
        log_extra("strange", values)
        return [0.] * len(completions)

    trainer = trainer_for(tmp_path, reward=reward, max_steps=1, log_completions=True)
    trainer.train()
    assert trainer.state.global_step == 1


# 21: the card

@pytest.mark.parametrize("fault", ["{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ messages[9].content.x.y }}", "{% for %}"])
@pytest.mark.slow
def test_a_template_that_fails_for_the_example_does_not_end_a_run(fault, tmp_path):
    if fault == "{% for %}": # A template that is broken as a whole is never used with text prompts
        tok, prompt = tokenizer_with(fault), "Help?"
    else:
        prompt = [dict(role="system", content="Be kind."), dict(role="user", content="Help?")]
        tok = tokenizer_with("{% if messages[0]['role'] != 'system' %}" + fault + "{% endif %}" + TURNS + ASK)
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=2, max_completion_length=4, max_steps=1, **QUIET)
    trainer = PPOTrainer(str(POLICY), lambda completions, **_: [0.] * len(completions), args,
                         Dataset.from_list([dict(prompt=prompt)] * 2), processing_class=tok,
                         peft_config=LoraConfig(r=4))
    trainer.train()
    trainer.save_model()
    assert (tmp_path/"README.md").is_file() and trainer.state.global_step == 1


# 22: more updates

class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 1


@pytest.mark.parametrize("settings, change, wanted", [
    (dict(max_steps=2), dict(max_steps=6), 6), (dict(max_steps=-1, num_train_epochs=2), dict(num_train_epochs=4), 4),
    (dict(max_steps=2, lr_scheduler_type="cosine"), dict(max_steps=5), 5),
    (dict(max_steps=-1, num_train_epochs=1), dict(max_steps=3), 3),
    (dict(max_steps=3), dict(max_steps=1), 3),
])
@pytest.mark.slow
def test_train_goes_on_to_what_the_settings_have_been_raised_to(settings, change, wanted, tmp_path):
    trainer = trainer_for(tmp_path, **settings)
    trainer.train()
    for name, value in change.items(): setattr(trainer.args, name, value)
    trainer.train()
    assert trainer.state.global_step == wanted
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert all(rate > 0 for rate in rates)


def test_train_goes_on_after_a_callback_has_stopped_it(tmp_path):
    trainer = trainer_for(tmp_path, max_steps=3)
    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 1
    trainer.train()
    assert trainer.state.global_step == 3


# 23: routers

@pytest.mark.parametrize("config", [
    VeraConfig(r=4, target_modules="all-linear"), LoHaConfig(r=4, target_modules="all-linear"),
    OFTConfig(oft_block_size=4, target_modules="all-linear"), LoraConfig(r=4, target_modules="all-linear", bias="none"),
], ids=["vera", "loha", "oft", "lora"])
@pytest.mark.parametrize("name", ["llama4_text", "phimoe"])
def test_all_linear_layers_of_a_model_with_routers(name, config):
    if name == "phimoe" and config.peft_type == "VERA": pytest.skip("VeRA needs layers of one size")
    load_policy(decoder(name), PPOConfig("unused", **QUIET), None, config)


class Router(nn.Linear):
    "As in a model of the user's own."
    def forward(self, x):
        y = super().forward(x)
        return y, y.sigmoid()


class Mlp(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.mlp, self.router = mlp, Router(64, 64, bias=False)
    def forward(self, x): return self.mlp(x) * self.router(x)[1]


def test_a_router_of_the_users_own():
    lm = decoder("llama")
    for layer in lm.model.layers: layer.mlp = Mlp(layer.mlp)
    policy = load_policy(lm, PPOConfig("unused", **QUIET), None, LoraConfig(r=4, target_modules="all-linear"))
    assert any("lora_A" in name for name, _ in policy.lm.named_parameters())


@pytest.mark.parametrize("name", ["llama4_text", "phimoe"])
def test_a_router_that_the_user_names_is_refused_by_its_name(name):
    lm = decoder(name)
    routers = sorted({n.rpartition(".")[2] for n, m in lm.named_modules()
                      if isinstance(m, nn.Linear) and type(m).forward is not nn.Linear.forward})
    assert routers and lora_targets(lm)
    with pytest.raises(ValueError, match="target_modules"):
        load_policy(lm, PPOConfig("unused", **QUIET), None, LoraConfig(r=4, target_modules=["q_proj", *routers]))


# 24: small messages

def talk_of(tmp_path, *texts):
    rows = [dict(conversations=[{"from": "human", "value": text}]) for text in texts]
    (tmp_path/"talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--prompt_template", "chat", "--train_file_dir", tmp_path/"talk.jsonl",
            "--validation_split_percentage", 0, "--max_steps", 1, "--log_with", "none"]


@pytest.mark.parametrize("fault", ["1 // 0", "m.content.index('z')", "m['content'] + 1", "range(10 ** 9)",
                                   "m['content'] | nothing", "'%d' % 'x'", "m.content.encode('ascii', 'x')"])
def test_a_template_that_fails_with_any_error(fault, tmp_path, capsys):
    at = policy_with_template(tmp_path/"policy", f"{{% for m in messages %}}{{{{ {fault} }}}}{{% endfor %}}")
    refused(capsys, short(at, REWARD, tmp_path/"out", *talk_of(tmp_path, "What now? 咳")),
            "talk.jsonl:1", "the chat template refuses it")


def test_a_template_that_fails_in_the_trainer(tmp_path):
    tok = tokenizer_with("{% for m in messages %}{{ m['content'] + 1 }}{% endfor %}")
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=2, max_completion_length=4, max_steps=1, **QUIET)
    trainer = PPOTrainer(str(POLICY), length, args, Dataset.from_list([dict(prompt=BEGUN[:1])] * 2),
                         processing_class=tok, peft_config=LoraConfig(r=4))
    with pytest.raises(ValueError, match="the chat template refuses"): trainer.train()


STRICT = ("{% for m in messages %}{% if not m['content'].strip() %}{{ raise_exception('no content') }}{% endif %}"
          "[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}" + ASK)


@pytest.mark.parametrize("start", ["", " ", "\n\n  "])
def test_a_template_that_refuses_blank_messages_and_a_long_prompt(start, tmp_path):
    flags = talk_of(tmp_path, start + "What now? " * 300, start + "Help? " * 300)
    run(*short(policy_with_template(tmp_path/"policy", STRICT), REWARD, tmp_path/"out", *flags))


def test_a_reward_model_whose_template_refuses_empty_messages_and_a_long_pair():
    model, tok = tiny_reward_model()
    tok.chat_template, tok.model_max_length = STRICT, 40
    score, = RewardModel(model, tok)([[dict(role="user", content="What now? " * 100)]], ["Rest. " * 100])
    assert score == score


def test_a_template_that_writes_nothing(tmp_path, capsys):
    at = policy_with_template(tmp_path/"policy", "{% if messages[0].role == 'nobody' %}x{% endif %}")
    refused(capsys, short(at, REWARD, tmp_path/"out", *talk_of(tmp_path, "What now?")), "talk.jsonl:1", "empty")


def test_a_prompt_without_tokens(tmp_path):
    with pytest.raises(ValueError, match="empty"): trainer_for(tmp_path, prompts=["Help", "", "x", "Cold"]).train()


@pytest.mark.parametrize("question", [17, None, ["What"], dict(a=1)], ids=str)
@pytest.mark.parametrize("read", [True, False])
@pytest.mark.slow
def test_a_question_that_is_no_text(question, read, tmp_path):
    rows = Dataset.from_list([dict(prompt=name, question=question) for name in NAMES])
    args = PPOConfig(str(tmp_path), per_device_train_batch_size=4, max_completion_length=4, max_steps=1,
                     log_completions=True, question_column="question" if read else None, **QUIET)
    try: PPOTrainer(str(POLICY), str(REWARD), args, rows, peft_config=LoraConfig(r=4)).train()
    except ValueError as e: assert read and "question" in str(e) and "TypeError" not in str(e), e
