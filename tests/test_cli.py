"The program, as a user runs it."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHARED
from peft import PeftModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_nb.program import main
from rlhf_nb.testing import tiny_policy

ORIGINAL = """--model_type bloom --model_name_or_path {policy} --reward_model_name_or_path {reward}
    --torch_dtype float16 --device_map auto --train_file_dir {data} --validation_file_dir {data}
    --batch_size 2 --max_source_length 256 --max_target_length 256 --max_train_samples 1000
    --use_peft True --lora_rank 8 --lora_alpha 16 --lora_dropout 0.05 --do_train --max_steps
    {steps} --learning_rate 1e-5 --save_steps {save} --output_dir {out} --early_stopping True
    --target_kl 0.1 --reward_baseline 0.0"""
FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "value_head.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}
METRICS = {
    "train/" + name
    for name in """objective/kl kl reward reward_std entropy objective/non_score_reward objective/rlhf_reward
    policy/clipfrac_avg policy/approxkl_avg loss/policy_avg loss/value_avg val/clipfrac_avg
    val/ratio val/ratio_var completions/mean_length completions/clipped_ratio learning_rate
    grad_norm loss num_tokens episode""".split()
}


def rlhf_nb(*flags, status=0, **env):
    "Run the installed program in a process of its own, with further variables; its output."
    run = subprocess.run(
        [Path(sys.executable).parent / "rlhf-nb", *map(str, flags)],
        capture_output=True,
        text=True,
        timeout=500,
        env=os.environ | env,
    )
    assert run.returncode == status, run.stdout + run.stderr
    return run.stdout + run.stderr


def history(out: Path) -> list[dict]:
    newest = max(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return json.loads((newest/"trainer_state.json").read_text())["log_history"]


def untimed(entry: dict) -> dict:
    return {
        k: v
        for k, v in entry.items()
        if not k.startswith("time/") and not k.endswith(("_time", "_runtime", "_per_second"))
    }


def short(policy, reward, out, *more):
    "Flags of a run of seconds on the shipped prompts."
    return [
        "train",
        "--model_name_or_path",
        policy,
        "--reward_model_name_or_path",
        reward,
        "--train_file_dir",
        ROOT / "data" / "finetune",
        "--do_train",
        "--batch_size",
        4,
        "--mini_batch_size",
        2,
        "--max_target_length",
        8,
        "--max_source_length",
        96,
        "--max_steps",
        2,
        "--save_steps",
        1,
        "--torch_dtype",
        "float32",
        "--learning_rate",
        0.01,
        "--disable_tqdm",
        "--output_dir",
        out,
        *more,
    ]


def run(*flags): main([str(f) for f in flags])


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    "The models that timings use."
    if not SHARED.exists(): pytest.skip("no shared data beside the checkout")
    out = tmp_path_factory.mktemp("bench")
    corpus = SHARED/"data"/"finetune"/"Belle_open_source_1k.json"
    subprocess.run(
        [sys.executable, SHARED / "bench" / "make_models.py", "tiny", out, corpus], check=True, capture_output=True
    )
    return dict(policy=out/"policy", reward=out/"reward")


@pytest.mark.parametrize(
    "data, steps, save",
    [
        ("finetune", 2, 1),
        pytest.param("sharegpt", 2, 1, marks=pytest.mark.slow),
        *(pytest.param(d, 100, 50, marks=pytest.mark.slow) for d in ("finetune", "sharegpt")),
    ],
)
def test_original_command_on_real_prompts(bench, tmp_path, data, steps, save):
    out = tmp_path/"outputs-rl-v1"
    text = rlhf_nb("train", *ORIGINAL.format(**bench, data=SHARED/"data"/data, out=out, steps=steps, save=save).split())
    assert ("float16 is not available on cpu" in text) == (not torch.cuda.is_available())
    for folder in (out, out / f"checkpoint-{save}", out / f"checkpoint-{2 * save}"):
        assert FILES <= {p.name for p in folder.iterdir()}
    events = EventAccumulator(str(out/"trl")).Reload()
    assert METRICS <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/objective/kl")] == list(range(1, steps + 1))
    assert events.Scalars("train/objective/kl")[0].value == 0
    base = AutoModelForCausalLM.from_pretrained(bench["policy"], dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, out)
    assert any(v.abs().max() > 0 for k, v in tuned.state_dict().items() if "lora_B" in k)


def test_merge_gives_the_adapters_logits(tiny, tmp_path):
    policy, reward = tiny
    run(*short(policy, reward, tmp_path/"run"))
    run(
        "merge",
        "--base_model_name_or_path",
        policy,
        "--peft_model_path",
        tmp_path / "run",
        "--output_dir",
        tmp_path / "merged",
    )
    ids = AutoTokenizer.from_pretrained(tmp_path/"merged")("What helps against a cough?", return_tensors="pt").input_ids
    with torch.no_grad():
        bare = AutoModelForCausalLM.from_pretrained(policy)(ids).logits
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(policy), tmp_path/"run")(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path/"merged")(ids).logits
    assert (adapted - bare).abs().max() > 1e-3
    torch.testing.assert_close(merged, adapted, rtol=0, atol=1e-4)


def test_resumed_run_is_the_run_that_never_stopped(tiny, tmp_path):
    run(*short(*tiny, tmp_path/"straight", "--max_steps", 4))
    run(*short(*tiny, tmp_path/"halves"))
    run(*short(*tiny, tmp_path/"halves", "--max_steps", 4, "--resume_from_checkpoint", "True"))
    for name in ("adapter_model.safetensors", "value_head.safetensors"):
        a, b = (load_file(tmp_path/run/name) for run in ("straight", "halves"))
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert [*map(untimed, history(tmp_path/"straight"))] == [*map(untimed, history(tmp_path/"halves"))]


def test_an_earlier_run_is_not_overwritten(tiny, tmp_path, capsys):
    run(*short(*tiny, tmp_path/"run"))
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as stop: run(*short(*tiny, tmp_path/"run"))
    assert stop.value.code == 2 and "holds an earlier run" in capsys.readouterr().err
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    run(*short(*tiny, tmp_path/"run", "--overwrite_output_dir"))


def test_only_event_files_are_ever_removed_from_trl(tiny, tmp_path, capsys):
    precious = tmp_path/"run"/"trl"/"precious.py"
    precious.parent.mkdir(parents=True)
    precious.write_text("x = 1")
    with pytest.raises(SystemExit): run(*short(*tiny, tmp_path/"run"))
    assert "holds an earlier run" in capsys.readouterr().err
    run(*short(*tiny, tmp_path/"run", "--overwrite_output_dir"))
    assert precious.read_text() == "x = 1"


def test_merge_with_another_base_is_an_error(tiny, tmp_path, capsys):
    run(*short(*tiny, tmp_path/"run", "--lora_rank", 4))
    other, tok = tiny_policy("bloom", hidden_size=32)
    other.save_pretrained(tmp_path/"other"); tok.save_pretrained(tmp_path/"other")
    with pytest.raises(SystemExit) as stop:
        run(
            "merge",
            "--base_model_name_or_path",
            tmp_path / "other",
            "--peft_model_path",
            tmp_path / "run",
            "--output_dir",
            tmp_path / "merged",
        )
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "is not an adapter of" in err and not (tmp_path/"merged").exists()


def test_damaged_weights_are_an_error(tiny, tmp_path, capsys):
    shutil.copytree(tiny[0], tmp_path/"cut")
    weights = tmp_path/"cut"/"model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SystemExit) as stop: run(*short(tmp_path/"cut", tiny[1], tmp_path/"out"))
    assert stop.value.code == 2 and "cannot be loaded" in capsys.readouterr().err and not (tmp_path/"out").exists()


def test_an_adapter_to_start_from_is_the_reference(tiny, tmp_path):
    run(*short(*tiny, tmp_path/"first", "--lora_rank", 4))
    run(*short(*tiny, tmp_path/"second", "--peft_path", tmp_path/"first"))
    first, second = (load_file(tmp_path/run/"adapter_model.safetensors") for run in ("first", "second"))
    assert first.keys() == second.keys() and any(not torch.equal(first[k], second[k]) for k in first)
    assert history(tmp_path/"second")[0]["objective/kl"] == 0


def test_without_an_adapter_all_weights_are_trained(tiny, tmp_path):
    run(*short(*tiny, tmp_path/"full", "--use_peft", "False", "--learning_rate", "1e-3"))
    before, after = (AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (tiny[0], tmp_path/"full"))
    assert all(not torch.equal(before[k], after[k]) for k in before)


def test_evaluation_alone_prints_and_writes_nothing(tiny, tmp_path, capsys):
    flags = [f for f in short(*tiny, tmp_path/"none") if f != "--do_train"]
    run(*flags, "--do_eval", "--max_eval_samples", 4)
    assert "eval_reward" in capsys.readouterr().out and not (tmp_path/"none").exists()


@pytest.mark.parametrize("flags, text", [
    pytest.param(["train", "--batch_size", "0"], "must be at least 1", marks=pytest.mark.slow),
    pytest.param(["train", "--do_train"], "--model_name_or_path is missing", marks=pytest.mark.slow),
    (["train", "--learningrate", "1"], "did you mean learning_rate?"),
    pytest.param(["train", "--config", "nowhere.yaml"], "nowhere.yaml", marks=pytest.mark.slow),
    pytest.param(["merge"], "--base_model_name_or_path is missing", marks=pytest.mark.slow),
])
def test_bad_input_is_one_line_and_status_2(flags, text):
    out = rlhf_nb(*flags, status=2)
    assert text in out and len(out.strip().splitlines()) <= 2 and "Traceback" not in out


def test_a_hub_name_that_cannot_be_reached_is_an_error_of_two_lines(tmp_path):
    out = rlhf_nb(*short("nobody/nothing", "nobody/reward", tmp_path/"out"), status=2)
    assert (
        "nobody/nothing" in out
        and len(out.strip().splitlines()) <= 3
        and "Traceback" not in out
        and not (tmp_path / "out").exists()
    )


def test_a_shell_completes_commands_and_settings():
    script = rlhf_nb("completion", "bash")
    said = '_shtab_rlhf_nb; echo "${COMPREPLY[@]}"'
    typed = f"COMP_WORDS=(rlhf-nb train --lora_r); COMP_CWORD=2; {said}; COMP_WORDS=(rlhf-nb de); COMP_CWORD=1; {said}"
    done = subprocess.run(["bash", "-c", f"{script}\n{typed}"], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["--lora_r", "--lora_rank", "demo"]
