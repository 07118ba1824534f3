"The script in examples/ runs as it is, for RLOO with one word changed, and in several processes."
import json
import os
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from huggingface_hub import HfApi
from kit import CHATS, PROMPTS, small_models
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

SCRIPT = ROOT/"examples"/"ppo.py"
DDP = str(ROOT/"rlhf_nb"/"accelerate_configs"/"ddp.yaml")


def save_data(folder, prompts):
    "Write train.jsonl and test.jsonl."
    folder.mkdir()
    for split, some in dict(train=prompts, test=prompts[:2]).items():
        (folder/f"{split}.jsonl").write_text("\n".join(json.dumps(dict(prompt=p)) for p in some))
    return folder


def flags(data, out, *more):
    models = small_models()
    return [str(x)
            for x in ("--model_name_or_path", models/"policy", "--reward_model_name_or_path", models/"judge",
                      "--dataset_name", data, "--output_dir", out, "--num_generations", 2,
                      "--per_device_train_batch_size", 4, "--max_completion_length", 4, "--max_steps", 2,
                      "--logging_steps", 1, "--eval_strategy", "steps", "--eval_steps", 2, "--report_to", "none",
                      "--use_cpu", "--bf16", "False", "--save_strategy", "steps", "--save_steps", 2, *more)]


def run(tmp_path, monkeypatch, library, arguments):
    "Run the script in this process; for TRL with the word changed."
    text = SCRIPT.read_text(encoding="utf-8")
    if library == "trl": text = text.replace("from rlhf_nb import", "from trl import").replace("PPO", "RLOO")
    script = tmp_path/f"{library}.py"
    script.write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("library", ["trl", "here"])
def test_all_weights(library, tmp_path, monkeypatch):
    data, out = save_data(tmp_path/"data", PROMPTS), tmp_path/"out"
    run(tmp_path, monkeypatch, library, flags(data, out))
    AutoModelForCausalLM.from_pretrained(out)
    state = json.loads((out/"checkpoint-2"/"trainer_state.json").read_text())
    logged = {key for entry in state["log_history"] for key in entry}
    assert state["global_step"] == 2 and {"rewards/brevity/mean", "rewards/judge/mean", "kl", "eval_reward"} <= logged


@pytest.mark.parametrize("library", ["trl", "here"])
def test_lora_chat_and_hub(library, tmp_path, monkeypatch):
    data, out, sent = save_data(tmp_path/"data", CHATS), tmp_path/"out", []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: SimpleNamespace(repo_id=f"me/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **kwargs: sent.append(kwargs["repo_id"]))
    run(tmp_path, monkeypatch, library,
        flags(data, out, "--use_peft", "--lora_r", 2, "--lora_target_modules", "q_proj", "v_proj", "--push_to_hub",
              "--hub_strategy", "end", "--eval_strategy", "no"))
    AutoPeftModelForCausalLM.from_pretrained(out)
    assert {*sent} == {"me/out"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher",
                         [["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
                          ["accelerate.commands.launch", "--config_file", DDP, "--num_processes", "2",
                           "--main_process_port", "0"]], ids=["torchrun", "accelerate launch"])
def test_two_processes(launcher, tmp_path):
    data, out = save_data(tmp_path/"data", PROMPTS), tmp_path/"out"
    done = subprocess.run([sys.executable, "-m", *launcher, str(SCRIPT), *flags(data, out)], capture_output=True,
                          text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((out/"checkpoint-2"/"trainer_state.json").read_text())
    assert state["global_step"] == 2 and state["log_history"][0]["episode"] == 8, "four completions of each process"
