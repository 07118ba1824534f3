"""Models whose code comes with the folder: train, save, merge, chat, evaluate, resume."""
import json
import shutil

import pytest
import torch
from test_cases import CODE, POLICY, REWARD, SMALL, saved, tokenizer
from test_cli import run, short
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from rlhf_nb.models import with_adapter

CONFIG = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
JUDGE = """
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.llama.modeling_llama import LlamaModel, LlamaPreTrainedModel

class OwnForSequenceClassification(LlamaPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, 1)
        self.post_init()
    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
        last = attention_mask.cumsum(1).argmax(1)
        return SequenceClassifierOutput(logits=self.score(hidden[range(len(last)), last]))
"""
IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=False)
REMOTE = "--trust_remote_code", True


def with_code(at, name, auto, code, own_config, **more):
    torch.manual_seed(0)
    saved(at, LlamaConfig(vocab_size=len(tokenizer()), **IDS, **SMALL, **more), auto)
    (at/"modeling_own.py").write_text(code)
    maps = {auto.__name__: f"modeling_own.{name}"}
    given = json.loads((at/"config.json").read_text()) | dict(architectures=[name], auto_map=maps)
    if own_config:
        (at/"configuration_own.py").write_text(CONFIG)
        maps["AutoConfig"] = "configuration_own.OwnConfig"
        given["model_type"] = "own"
    (at/"config.json").write_text(json.dumps(given))
    return at


def with_config(code):
    code = code.replace("class Own", "from .configuration_own import OwnConfig\n\nclass Own", 1)
    return code.replace("    def __init__(", "    config_class = OwnConfig\n    def __init__(", 1)


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["llama's config", "own config"])
def policy(request, tmp_path):
    code = with_config(CODE) if request.param else CODE
    return with_code(tmp_path/"policy", "OwnForCausalLM", AutoModelForCausalLM, code, request.param)


@pytest.fixture(params=[pytest.param(False, marks=pytest.mark.slow), True],
                ids=["judge of llama's config", "judge of its own"])
def judge(request, tmp_path):
    at = with_code(tmp_path/"judge", "OwnForSequenceClassification", AutoModelForSequenceClassification,
                   with_config(JUDGE) if request.param else JUDGE, request.param, num_labels=1)
    from safetensors.torch import load_file, save_file
    weights = load_file(at/"model.safetensors")
    weights["score.bias"] = torch.zeros(1)
    save_file(weights, at/"model.safetensors", metadata=dict(format="pt"))
    return at


def flags(policy, judge, out, *more):
    return short(policy, judge, out, "--max_steps", 2, "--save_steps", 1, "--log_with", "none", *REMOTE, *more)


def history(out): return json.loads((out/"trainer_state.json").read_text())["log_history"]


@pytest.mark.slow
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_train_save_resume_chat_eval_and_merge(lora, policy, tmp_path, capsys):
    more = () if lora else ("--use_peft", False)
    out = tmp_path/"out"
    run(*flags(policy, REWARD, out, *more))
    shutil.copytree(out, tmp_path/"again")
    shutil.rmtree(tmp_path/"again"/"checkpoint-2")
    run(*flags(policy, REWARD, tmp_path/"again", *more, "--resume_from_checkpoint", True))
    a, b = ({k: v for k, v in history(o)[-2].items() if "/" in k and "time" not in k} for o in (out, tmp_path/"again"))
    assert a == b
    ids = torch.arange(5, 17)[None]
    if lora:
        run("merge", "--base_model_name_or_path", policy, "--peft_model_path", out, "--output_dir", tmp_path/"merged",
            *REMOTE)
        base = AutoModelForCausalLM.from_pretrained(policy, trust_remote_code=True)
        ours = with_adapter(base, str(out))(input_ids=ids).logits
    at = tmp_path/"merged" if lora else out
    whole = AutoModelForCausalLM.from_pretrained(at, trust_remote_code=True) # With its code beside it
    assert type(whole).__name__ == "OwnForCausalLM"
    if lora: assert (whole(input_ids=ids).logits - ours).abs().max() < 1e-4
    run(*flags(at, REWARD, tmp_path/"third", *more)) # And it can be trained further
    (tmp_path/"v.jsonl").write_text(json.dumps(dict(instruction="What now?", output="x")))
    capsys.readouterr()
    run("eval", out, "--reward_model_name_or_path", REWARD, "--validation_file_dir", tmp_path/"v.jsonl",
        "--max_completion_length", 4, *REMOTE)
    assert capsys.readouterr().out


def test_chat(policy, tmp_path, monkeypatch, capsys):
    import io
    run(*flags(policy, REWARD, tmp_path/"out"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Help?\n"))
    capsys.readouterr()
    run("chat", tmp_path/"out", *REMOTE)
    assert capsys.readouterr().out


def test_a_judge_with_its_own_code(judge, tmp_path):
    run(*flags(POLICY, judge, tmp_path/"out"))
    run(*flags(POLICY, judge, tmp_path/"out", "--max_steps", 3, "--resume_from_checkpoint", True))


@pytest.mark.parametrize("which", ["policy", "judge"])
def test_code_is_not_run_unasked(which, policy, judge, tmp_path, capsys):
    at = policy if which == "policy" else judge
    marker = tmp_path/"ran"
    for file in at.glob("*.py"): file.write_text(f"open({str(marker)!r}, 'w')\n" + file.read_text())
    both = (policy, REWARD) if which == "policy" else (POLICY, judge)
    try: run(*short(*both, tmp_path/"out", "--max_steps", 1, "--log_with", "none"))
    except SystemExit as stop: assert stop.code == 2
    assert not marker.exists()


def test_plan(policy, judge, capsys):
    run("plan", "--model_name_or_path", policy, "--reward_model_name_or_path", judge, "--gpu", "T4", *REMOTE)
    assert "GB" in capsys.readouterr().out
