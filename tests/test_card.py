"The model card, and what is taken out of files before they are uploaded."
import json
import logging
from types import SimpleNamespace

from transformers import AutoTokenizer

from rlhf_nb.config import PPOConfig
from rlhf_nb.hub import changed_settings, example_prompt, make_public, model_card, run_settings, without_paths

SETTINGS = run_settings(PPOConfig("secret/runs", learning_rate=1e-5, max_steps=100, generation_batch_size=16,
                                  bf16=True, report_to="none",
                                  hub_token="hf_secret", model_init_kwargs=dict(token="hf_secret", revision="v2")))
ABOUT = dict(settings=SETTINGS, data=dict(train_prompts=1000, eval_prompts=50, dataset_name="BelleGroup/train_0.5M_CN"),
             model=dict(policy="bigscience/bloomz-560m", rewards=["OpenAssistant/reward-model-deberta-v3-large-v2"],
                        adapter=True, trained=786_432,
                        parameters=560_000_000),
             machine=dict(device="cuda", dtype="float16"), versions=dict(rlhf_nb="0.1.0", torch="2.13.0"))
HISTORY = [{"eval_reward": .1, "eval_objective/kl": 0., "eval_completions/mean_length": 90., "step": 0},
           {"eval_reward": .9, "eval_objective/kl": 2., "eval_completions/mean_length": 120., "step": 100}]
PROMPT = "### Instruction:\nWhat helps?\n\n### Response: "


def test_what_a_card_says():
    card = model_card(ABOUT, HISTORY, "me/outputs-rl-v1", PROMPT, curves=True)
    assert (card.data.base_model, card.data.library_name, card.data.pipeline_tag) == ("bigscience/bloomz-560m", "peft",
                                                                                      "text-generation")
    assert card.data.datasets == ["BelleGroup/train_0.5M_CN"]
    assert "base_model:adapter:bigscience/bloomz-560m" in card.data.tags
    assert card.text.startswith("\n# outputs-rl-v1\n") or card.text.startswith("# outputs-rl-v1\n")
    table = ("| validation prompts (50) | before | after |\n| --- | --- | --- |\n"
             "| reward | 0.10 | 0.90 |\n| KL | 0.00 | 2.00 |\n| completion length | 90.00 | 120.00 |\n")
    assert table in card.text
    assert 'model = AutoPeftModelForCausalLM.from_pretrained("me/outputs-rl-v1")\ntokenizer = ' in card.text
    assert f"\nprompt = {PROMPT!r}\n" in card.text and "max_new_tokens=512)" in card.text and "curves.png" in card.text
    assert "| setting | value |\n| --- | --- |\n" in card.text and "| `learning_rate` | 1e-05 |\n" in card.text
    assert "100 PPO updates of 16 completions; 786,432 of 560,000,000 parameters trained; float16 on cuda." in card.text
    assert "output_dir" not in card.text and "secret" not in card.content


def test_what_the_caller_says_of_it():
    card = model_card(ABOUT, [], "me/x", None, model_name="Little helper", dataset_name="you/set", tags="mine")
    assert "# Little helper" in card.text and card.data.datasets == ["you/set"] and card.data.tags[-1] == "mine"
    assert "ppo" in card.data.tags
    assert "prompt =" not in card.text and 'tokenizer = AutoTokenizer.from_pretrained("me/x")\n~~~' in card.text
    assert "No validation prompts" in card.text
    assert {"a", "b"} <= {*model_card(ABOUT, [], "me/x", tags=["a", "b"]).data.tags}


def test_a_folder_of_this_machine_is_named_by_its_last_part():
    local = ABOUT | dict(model=ABOUT["model"] | dict(policy="/data/secret/policy", adapter=False),
                         data=dict(train_prompts=3, eval_prompts=0, dataset_name="/data/secret/set"))
    card = model_card(local, [], "mine", "Hi")
    assert (card.data.base_model, card.data.library_name, card.data.datasets) == (None, "transformers", None)
    assert "`policy`" in card.text and "secret" not in card.content and "secret" not in str(without_paths(local))
    assert without_paths(["/data/secret/policy", "org/model"]) == ["policy", "org/model"]


def test_settings_have_no_secrets_and_only_what_was_changed():
    assert SETTINGS["model_init_kwargs"] == dict(revision="v2") and "output_dir" not in SETTINGS
    assert "hf_secret" not in json.dumps(SETTINGS)
    assert changed_settings(SETTINGS) == dict(learning_rate=1e-5, max_steps=100, generation_batch_size=16,
                                              steps_per_generation=2, bf16=True,
                                              model_init_kwargs=dict(revision="v2"))


def test_files_to_upload_are_cleaned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public, run = tmp_path/"public", tmp_path/"my"/"run"
    for folder in (public/"critic", run): folder.mkdir(parents=True)
    (public/"trainer_state.json").write_text(json.dumps(dict(best_model_checkpoint=str(run/"checkpoint-5"),
                                                             log_history=[{"reward": .5}])))
    (public/"run.json").write_text(json.dumps(ABOUT | dict(model=dict(policy="my/run", rewards=["me/judge"]),
                                                           settings=dict(stop_strings=["</s>", "/s"]))))
    adapter = json.dumps(dict(base_model_name_or_path=str(run), r=8))
    for folder in (public, public/"critic"): (folder/"adapter_config.json").write_text(adapter)
    make_public(public)
    read = lambda name: json.loads((public/name).read_text())
    assert read("trainer_state.json") == dict(best_model_checkpoint="checkpoint-5", log_history=[{"reward": .5}])
    assert read("run.json")["model"] == dict(policy="run", rewards=["me/judge"])
    assert read("run.json")["settings"] == dict(stop_strings=["</s>", "/s"])
    assert read("adapter_config.json") == read("critic/adapter_config.json") == dict(base_model_name_or_path="run", r=8)


def test_a_template_that_refuses_the_example_is_said(tiny, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny[0])
    alpaca = example_prompt(dict(prompt_template="alpaca"), tokenizer)
    assert alpaca.endswith("### Instruction:\nWhat is the sun made of?\n\n### Response: ")
    assert example_prompt({}, tokenizer) == "What is the sun made of?"
    tokenizer.chat_template = "{{ raise_exception('only in Latin') }}"
    with caplog.at_level(logging.WARNING):
        assert example_prompt(dict(prompt_template="chat"), tokenizer) is None
    assert "refuses it (only in Latin); the card is written without an example" in caplog.text


def test_a_prompt_that_begins_with_bos_gets_no_second_one():
    tokenizer = SimpleNamespace(bos_token="<s>")
    assert "add_special_tokens=False" in model_card(ABOUT, [], "me/x", "<s>Hi", tokenizer).text
    assert "add_special_tokens=False" not in model_card(ABOUT, [], "me/x", "Hi", tokenizer).text
