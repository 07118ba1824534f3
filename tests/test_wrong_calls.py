"Whatever is wrong with a call: status 2, one or two lines, no traceback, nothing written."
import json
import os
import re
import shutil

import pytest
import torch
from test_cli import short
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel, T5Config, T5ForConditionalGeneration

from rlhf_nb.cli import NAMES
from rlhf_nb.program import main
from rlhf_nb.testing import tiny_policy, tiny_reward_model

NUMBERS = {  # The original's names, and today's
    "batch_size": ("0", "-1", "1.5", "many"),
    "mini_batch_size": ("0",),
    "num_ppo_epochs": ("0",),
    "gradient_accumulation_steps": ("0", "-2"),
    "max_source_length": ("0",),
    "max_target_length": ("0",),
    "min_target_length": ("-1",),
    "temperature": ("0", "-1", "nan", "inf"),
    "rollout_batch_size": ("0",),
    "importance_sampling_cap": ("0",),
    "reward_batch_size": ("0",),
    "reward_weights": ("nan", "heavy"),
    "vllm_server_timeout": ("0",),
    "vllm_group_port": ("0",),
    "score_clip": ("0", "-1"),
    "reward_timeout": ("0",),
    "reward_workers": ("0",),
    "reward_processes": ("0", "-1", "1.5"),
    "init_kl_coef": ("-0.1", "nan"),
    "adap_kl_target": ("0",),
    "adap_kl_horizon": ("0",),
    "target_kl": ("0",),
    "kl_estimator": ("k9",),
    "gamma": ("1.1", "-0.1"),
    "lam": ("2",),
    "cliprange": ("0", "-0.2"),
    "cliprange_value": ("0",),
    "vf_coef": ("-1",),
    "critic": ("nobody",),
    "ent_coef": ("-1",),
    "ptx_coef": ("-1",),
    "learning_rate": ("-1", "nan"),
    "lr_scheduler_type": ("zigzag",),
    "warmup_steps": ("-1",),
    "adam_beta1": ("1.5",),
    "max_grad_norm": ("-1",),
    "optim": ("fastest",),
    "max_steps": ("1e9.5",),
    "save_steps": ("-1",),
    "save_total_limit": ("0",),
    "max_skipped_updates": ("0",),
    "log_with": ("paper",),
    "torch_dtype": ("int4",),
    "seed": ("-1",),
    "lora_rank": ("0", "-8"),
    "lora_alpha": ("-1",),
    "lora_dropout": ("2",),
    "max_train_samples": ("0",),
    "template_name": ("nobody",),
    "validation_split_percentage": ("101",),
    "per_device_train_batch_size": ("0", "3"),
    "steps_per_generation": ("0",),
    "generation_batch_size": ("3",),
    "num_generations": ("0", "3"),
    "num_iterations": ("0",),
    "num_train_epochs": ("0",),
    "max_prompt_length": ("0",),
    "max_completion_length": ("0",),
    "top_p": ("1.5",),
    "top_k": ("-1",),
    "min_p": ("-1",),
    "repetition_penalty": ("0",),
    "beta": ("-1",),
    "epsilon": ("0",),
    "reward_clip_range": ("1",),
    "ref_model_mixup_alpha": ("2",),
    "eval_strategy": ("daily",),
    "save_strategy": ("daily",),
    "report_to": ("paper",),
    "lora_r": ("0",),
    "dtype": ("int4",),
    "torch_compile": ("True",),
    "label_smoothing_factor": (".1",),
    "dataloader_num_workers": ("2",),
    "vllm_mode": ("moon",),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "A good policy and reward model, and bad ones."
    at = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    def save(name, model, tok):
        model.save_pretrained(at/name)
        if tok: tok.save_pretrained(at/name)
    policy, tok = tiny_policy("bloom")
    reward, rtok = tiny_reward_model()
    save("policy", policy, tok); save("reward", reward, rtok)
    save("gpt2", *tiny_policy("gpt2"))
    save("three", *tiny_reward_model(num_labels=3))
    save("small", *tiny_policy("bloom", hidden_size=32))
    save(
        "t5",
        T5ForConditionalGeneration(
            T5Config(vocab_size=len(tok), d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
        ),
        tok,
    )
    save(
        "bert",
        BertLMHeadModel(
            BertConfig(
                vocab_size=len(tok), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
            )
        ),
        tok,
    )
    save("no_tokenizer", policy, None)
    tok.add_tokens(["<more>"])
    tok.save_pretrained(at/"more_tokens")
    for name in ("cut", "no_eos", "no_config", "nonsense"): shutil.copytree(at/"policy", at/name)
    weights = at/"cut"/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    settings = json.loads((at/"no_eos"/"tokenizer_config.json").read_text())
    (at / "no_eos" / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if k != "eos_token"})
    )
    (at/"no_eos"/"special_tokens_map.json").unlink(missing_ok=True)
    assert AutoTokenizer.from_pretrained(at/"no_eos").eos_token is None
    (at/"no_config"/"config.json").unlink()
    (at/"nonsense"/"config.json").write_text("{")
    (at/"empty").mkdir()
    files = dict(
        broken='[{"instruction": "a"',
        other='[{"x": 1}]',
        number="3",
        nothing="[]",
        yaml="batch_size: [",
        unknown="batchsize: 4",
        list_="- 1",
        bad="batch_size: 0",
    )
    for name, text in files.items():
        (at/f"d_{name}").mkdir()
        (at/f"d_{name}"/("data.json" if "batch" not in text and text != "- 1" else "run.yaml")).write_text(text)
    (at/"d_binary").mkdir(); (at/"d_binary"/"data.json").write_bytes(bytes(range(256)))
    (at/"file").write_text("x")
    flags = short(at/"policy", at/"reward", at/"run", "--max_steps", 1, "--min_target_length", 1, "--log_with", "none")
    main([str(f) for f in flags])
    main([str(f) for f in [*flags, "--output_dir", at/"torn"]])
    (at/"torn"/"checkpoint-1"/"value_head.safetensors").unlink()
    return at, flags


def refused(capsys, flags, out, *texts):
    before = sorted((p, p.stat().st_mtime_ns) for p in out.parent.rglob("*")) if out.exists() else None
    with pytest.raises(SystemExit) as stop: main([str(f) for f in flags])
    said = capsys.readouterr()
    lines = [line for line in (said.out + said.err).strip().splitlines() if "trust_remote_code" not in line]
    assert stop.value.code == 2, said
    assert 1 <= len(lines) <= 3 and "Traceback" not in said.err, said
    assert all(re.search(text, said.err) for text in texts), said.err
    if before is None: assert not out.exists()
    else: assert before == sorted((p, p.stat().st_mtime_ns) for p in out.parent.rglob("*"))


@pytest.mark.parametrize("name, value", [(name, value) for name, values in NUMBERS.items() for value in values])
def test_wrong_values(world, tmp_path, capsys, name, value):
    at, flags = world
    older = [
        i for i, flag in enumerate(flags) if NAMES.get(str(flag).removeprefix("--")) == name
    ]  # Two names would be refused for that
    flags = [flag for i, flag in enumerate(flags) if not {i, i - 1} & {*older}]
    refused(
        capsys,
        [*flags, f"--{name}={value}", "--output_dir", tmp_path / "out"],
        tmp_path / "out",
        "paper is not supported" if value == "paper" else name,
    )


CALLS = {  # What is added to a good call; what the message says
    "min over max": ("--min_target_length 9", "min_target_length"),
    "weights for two rewards": ("--reward_weights 1 2", "reward_weights"),
    "no address": ("--use_vllm --vllm_server_base_url localhost:8000", "vllm_server_base_url"),
    "two precisions": ("--bf16 True --fp16 True", "bf16"),
    "two names of one setting": ("--lora_rank 4 --lora_r 8", "lora_rank and lora_r are one setting"),
    "a batch of part of a pass": (
        "--batch_size 5",
        "batch_size=5 must be a multiple of per_device_train_batch_size=2 .given as mini_batch_size",
    ),
    "several unknown names": (
        "--batchsize 1 --ppo_epochs 2",
        "batchsize is unknown .did you mean batch_size.*; ppo_epochs is num_iterations here",
    ),
    "a field without meaning here": ("--neftune_noise_alpha 5", "neftune_noise_alpha=5.0 is not supported"),
    "an evaluation that nobody asked for": ("--eval_steps 1", "eval_steps=1.0 needs do_eval"),
    "no server": ("--use_vllm --vllm_server_timeout .1 --vllm_server_base_url http://127.0.0.1:1", "use_vllm: "),
    "critic without adapter": ("--use_peft False --critic adapter", "critic=adapter"),
    "8 and 4 bits": ("--load_in_8bit --load_in_4bit", "8 ?bit"),
    "nothing adapted": ("--target_modules nowhere", "nowhere"),
    "prompt and answer too long": (
        "--max_source_length 100000 --model_name_or_path {at}/gpt2",
        "max_prompt_length . max_completion_length",
    ),
    "no such folder": ("--train_file_dir {at}/nowhere", "nowhere"),
    "empty folder": ("--train_file_dir {at}/empty", "empty"),
    "broken json": ("--train_file_dir {at}/d_broken", "d_broken"),
    "other columns": ("--train_file_dir {at}/d_other", "d_other|instruction"),
    "a number": ("--train_file_dir {at}/d_number", "d_number"),
    "no rows": ("--train_file_dir {at}/d_nothing", "d_nothing: no prompts"),
    "not text": ("--train_file_dir {at}/d_binary", "d_binary"),
    "no validation folder": ("--do_eval --validation_file_dir {at}/nowhere", "nowhere"),
    "no such model": ("--model_name_or_path {at}/nowhere", "nowhere"),
    "a folder without a model": ("--model_name_or_path {at}/empty", "empty"),
    "a file as a model": ("--model_name_or_path {at}/file", "file"),
    "cut weights": ("--model_name_or_path {at}/cut", "cut"),
    "no config": ("--model_name_or_path {at}/no_config", "no_config"),
    "broken config": ("--model_name_or_path {at}/nonsense", "nonsense"),
    "no tokenizer": ("--model_name_or_path {at}/no_tokenizer", "no_tokenizer"),
    "encoder-decoder": ("--model_name_or_path {at}/t5", "encoder-decoder"),
    "masked model": ("--model_name_or_path {at}/bert", "decoder"),
    "reward model as policy": ("--model_name_or_path {at}/reward", "reward"),
    "tokenizer without EOS": ("--tokenizer_name_or_path {at}/no_eos", "EOS"),
    "no such tokenizer": ("--tokenizer_name_or_path {at}/nowhere", "nowhere"),
    "another type": ("--model_type llama", "model_type"),
    "no such adapter": ("--peft_path {at}/nowhere", "nowhere"),
    "adapter of another model": (
        "--model_name_or_path {at}/small --tokenizer_name_or_path {at}/policy --peft_path {at}/run",
        "run",
    ),
    "no such reward model": ("--reward_model_name_or_path {at}/nowhere", "nowhere"),
    "policy as reward model": ("--reward_model_name_or_path {at}/policy", "classifier"),
    "three labels": ("--reward_model_name_or_path {at}/three", "reward_label"),
    "no such label": ("--reward_model_name_or_path {at}/three --reward_label 7", "reward_label"),
    "hub name, offline": ("--model_name_or_path nobody/nothing", "nobody/nothing"),
    "reward's hub name, offline": ("--reward_model_name_or_path nobody/nothing", "nobody/nothing"),
    "adapter's hub name, offline": ("--peft_path nobody/nothing", "nobody/nothing"),
    "no yaml": ("--config {at}/nowhere.yaml", "nowhere"),
    "broken yaml": ("--config {at}/d_yaml/run.yaml", "YAML"),
    "unknown name in yaml": ("--config {at}/d_unknown/run.yaml", "did you mean"),
    "yaml without names": ("--config {at}/d_list_/run.yaml", "run.yaml"),
    "wrong value in yaml": ("--config {at}/d_bad/run.yaml --batch_size_ 1", "batch_size"),
    "unknown flag": ("--learningrate 1", "did you mean learning_rate"),
    "flag without a value": ("--learning_rate", "learning_rate"),
    "nothing to resume": ("--resume_from_checkpoint True", "Nothing to resume"),
    "no such checkpoint": ("--resume_from_checkpoint {at}/nowhere", "nowhere"),
    "no checkpoint": ("--resume_from_checkpoint {at}/policy", "manifest"),
    "a torn checkpoint": ("--resume_from_checkpoint {at}/torn/checkpoint-1", "value_head.safetensors is missing"),
    "another rank": ("--lora_rank 4 --resume_from_checkpoint {at}/run/checkpoint-1", "adapter.r was 8, is 4"),
    "another tokenizer": (
        "--tokenizer_name_or_path {at}/more_tokens --resume_from_checkpoint {at}/run/checkpoint-1",
        "tokenizer was .* tokens",
    ),
    "another model": (
        "--model_name_or_path {at}/small --resume_from_checkpoint {at}/run/checkpoint-1",
        "model.hidden_size was",
    ),
}


@pytest.mark.parametrize("more, text", CALLS.values(), ids=CALLS.keys())
def test_wrong_calls(world, tmp_path, capsys, more, text):
    at, flags = world
    refused(capsys, [*flags, "--output_dir", tmp_path/"out", *more.format(at=at).split()], tmp_path/"out", text)


def test_wrong_output_dirs(world, tmp_path, capsys):
    at, flags = world
    (tmp_path/"file").touch()
    locked = tmp_path/"locked"
    locked.mkdir(mode=0o500)
    refused(capsys, [*flags, "--output_dir", tmp_path/"file"], tmp_path/"file", "is a file")
    refused(capsys, [*flags, "--output_dir", tmp_path/"file"/"out"], tmp_path/"file", "file")
    refused(capsys, [*flags, "--output_dir", at/"run"], at/"run", "holds an earlier run")
    if os.geteuid(): refused(capsys, [*flags, "--output_dir", locked/"out"], locked/"out", "locked")


def test_with_debug_the_traceback_is_shown(world, tmp_path, capsys):
    at, flags = world
    with pytest.raises(SystemExit):
        main([*map(str, flags), "--debug", "--output_dir", str(tmp_path / "out"), "--model_name_or_path", f"{at}/t5"])
    assert "Traceback" in capsys.readouterr().err


def test_there_are_enough():
    assert sum(map(len, NUMBERS.values())) + len(CALLS) >= 60
