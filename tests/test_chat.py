"Talking to models and scoring them, as a user does."
import fcntl
import io
import json
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from statistics import mean

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf_nb.chat import EvalArguments, evaluate, mean_interval, win_rate
from rlhf_nb.cli import DEMO, as_flags, train
from rlhf_nb.clinic import CLINIC
from rlhf_nb.program import main

PROGRAM = Path(sys.executable).parent/"rlhf-nb"


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    "An adapter that changes what the policy writes, in a folder as a run leaves it."
    out = tmp_path_factory.mktemp("tuned")
    lm = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny[0]),
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"),
    )
    torch.manual_seed(0)
    for name, p in lm.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p)
    lm.save_pretrained(out)
    (out / "run.json").write_text(
        json.dumps(
            dict(
                settings=dict(max_completion_length=20, max_prompt_length=256, bf16=False, seed=0, temperature=0.9),
                data={},
                model=dict(policy=str(tiny[0])),
            )
        )
    )
    return out


def piped(questions: str, *flags, status=0) -> tuple[str, str]:
    run = subprocess.run([PROGRAM, *map(str, flags)], input=questions.encode(), capture_output=True, timeout=200)
    assert run.returncode == status, run.stderr.decode()
    return run.stdout.decode(), run.stderr.decode()


def at_terminal(columns: int, keys: list[bytes], *flags, in_answer: str = "base") -> tuple[str, int]:
    "Type `keys`, one at each prompt, Ctrl-C where `in_answer` stands. What came on the screen, and the exit status."
    pid, fd = pty.fork()
    if not pid:
        env = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")} | dict(TERM="xterm")
        os.execve(PROGRAM, [str(PROGRAM), *map(str, flags)], env)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    raw, seen, mark, end = b"", "", 0, time.monotonic() + 150
    try:
        while time.monotonic() < end:
            if select.select([fd], [], [], .2)[0]:
                try: raw += os.read(fd, 65536)
                except OSError: break
                seen = raw.decode(errors="ignore")
            if keys and (in_answer in seen[mark:] if keys[0] == b"\x03" else seen[mark:].endswith("> ")):
                mark = len(seen)
                time.sleep(.3) # A Ctrl-C between prompt and reading is lost in Python's readline
                os.write(fd, keys.pop(0))
    finally: os.close(fd)
    return seen, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def frames(screen: str) -> list[str]:
    "What stood there, one after the other."
    return [re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", f) for f in re.split(r"(?:\x1b\[\d*[AK]|\r(?!\n))+", screen)]


@pytest.mark.slow
def test_two_columns_grow_on_a_wide_terminal(tuned):
    screen, status = at_terminal(
        100, [b"Why?\r", "发烧怎么办？\r".encode(), b"\x04"], "chat", tuned, "--max_completion_length", 200
    )
    assert status == 0 and "\ufffd\x1b" not in screen
    heads = [f for f in frames(screen) if re.search(r"base {40,}tuned", f)]
    assert len({*heads}) > 4, screen
    assert "prompt_template 'alpaca', temperature 0.9, seed 0" in screen


@pytest.mark.slow
def test_one_below_the_other_on_a_narrow_terminal(tuned):
    screen, status = at_terminal(60, [b"Why?\r", b"exit\r"], "chat", tuned)
    assert status == 0 and "base  " not in screen
    last = [f for f in frames(screen) if "tuned" in f][-1]
    assert max(map(len, last.splitlines())) <= 60


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_not_the_chat(tuned):
    screen, status = at_terminal(100, [b"Why?\r", b"\x03", b"\r"], "chat", tuned, "--max_completion_length", 1500)
    assert status == 0 and "(stopped)" in screen


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_ends_with_130(tuned):
    screen, status = at_terminal(100, [b"\x03"], "chat", tuned, in_answer="> ")
    assert status == 130 and "Traceback" not in screen


@pytest.mark.slow
def test_a_pipe_gets_plain_text(tuned, tiny):
    out, err = piped("Why?\n\n发烧怎么办？\n", "chat", tuned, "--do_sample", "False")
    assert (
        "\x1b" not in out
        and out.startswith("> Why?\nbase: ")
        and "\n> 发烧怎么办？\nbase: " in out
        and out.count("tuned: ") == 2
    )
    assert "the most likely token each time" in err
    again, _ = piped("Why?\n", "chat", tuned, "--temperature", 0)
    assert out.startswith(again)


@pytest.mark.slow
def test_a_model_trained_in_full_is_compared_with_its_base(tiny, tmp_path):
    shutil.copytree(tiny[0], tmp_path/"full")
    out, err = piped("Why?\n", "chat", tmp_path/"full", status=2)
    assert "give --base_model_name_or_path" in err and not out
    (tmp_path / "full" / "run.json").write_text(
        json.dumps(dict(settings=dict(max_completion_length=8, bf16=False), model=dict(policy=str(tiny[0]))))
    )
    out, _ = piped("Why?\n", "chat", tmp_path/"full")
    base, tuned = re.fullmatch(r"> Why\?\nbase: (.*)\ntuned: (.*)\n", out, re.S).groups()
    assert base == tuned


@pytest.mark.parametrize(
    "flags, text",
    [
        (["chat"], "required: OUTPUT_DIR"),
        (["chat", "./nowhere"], "./nowhere: no such folder"),
        (["chat", "{tiny}/.."], "neither adapter_config.json nor config.json"),
        (["chat", "{tuned}", "--temperature", "-1"], "temperature=-1.0: must be 0 or more"),
        (["chat", "{tuned}", "--prompt_template", "chat"], "no chat template"),
        (
            ["chat", "{tuned}", "--base_model_name_or_path", "./nowhere"],
            "base_model_name_or_path=./nowhere: no such folder",
        ),
        (["chat", "{tuned}", "--max_source_length", "10"], "max_prompt_length=10 is shorter than the template"),
        (["eval"], "required: MODEL"),
        (["eval", "{tuned}"], "--reward_model_name_or_path is missing"),
        (["eval", "{tuned}", "--reward_model_name_or_path", "{reward}"], "--validation_file_dir is missing"),
        (
            ["eval", "{tuned}", "--reward_model_name_or_path", "{tiny}", "--validation_file_dir", "{data}"],
            "not a sequence classifier",
        ),
        (
            ["eval", "{reward}", "--reward_model_name_or_path", "{reward}", "--validation_file_dir", "{data}"],
            "not a causal language model",
        ),
        (
            ["eval", "{tuned}", "--reward_model_name_or_path", "{reward}", "--validation_file_dir", "./nowhere"],
            "nowhere: no such file or folder",
        ),
        (
            [
                "eval",
                "{tuned}",
                "{tuned}",
                "more",
                "--reward_model_name_or_path",
                "{reward}",
                "--validation_file_dir",
                "{data}",
            ],
            "unexpected more",
        ),
    ],
)
def test_wrong_calls(tiny, tuned, capsys, monkeypatch, flags, text):
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n"))
    with pytest.raises(SystemExit) as stop:
        main([f.format(tiny=tiny[0], reward=tiny[1], tuned=tuned, data=CLINIC / "unseen.jsonl") for f in flags])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and text in err and "Traceback" not in err


def test_eval_writes_a_line_for_each_prompt_and_nothing_over_another(tiny, tuned, tmp_path, capsys):
    out = tmp_path/"scores.jsonl"
    flags = [
        "eval",
        tuned,
        tiny[0],
        "--reward_model_name_or_path",
        tiny[1],
        "--validation_file_dir",
        ROOT / "data" / "finetune",
        "--max_eval_samples",
        12,
        "--output_file",
        out,
        "--disable_tqdm",
    ]
    main([*map(str, flags)])
    said = capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12 and rows[0].keys() == {
        "prompt",
        "question",
        "models",
        "answers",
        "tokens",
        "ended",
        "scores",
    }
    ours, theirs = zip(*(row["scores"] for row in rows))
    for interval in (
        mean_interval(ours),
        mean_interval(theirs),
        mean_interval([a - b for a, b in zip(ours, theirs)]),
        win_rate(ours, theirs),
    ):
        assert str(interval) in said
    before = out.read_bytes()
    with pytest.raises(SystemExit) as stop: main([*map(str, flags)])
    assert stop.value.code == 2 and "--overwrite_output_file" in capsys.readouterr().err and out.read_bytes() == before
    main([*map(str, flags), "--overwrite_output_file"])
    assert out.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["scores.jsonl"]


def test_a_model_beside_itself(tiny):
    rows = evaluate(
        str(tiny[0]),
        str(tiny[0]),
        EvalArguments(
            reward_model_name_or_path=str(tiny[1]),
            validation_file_dir=str(ROOT / "data" / "finetune"),
            do_sample=True,
            max_eval_samples=20,
            max_completion_length=8,
            disable_tqdm=True,
        ),
    )
    ours, theirs = zip(*(row["scores"] for row in rows))
    assert win_rate(ours, theirs).value == .5 and mean_interval([a - b for a, b in zip(ours, theirs)]) == (0, 0, 0)


CLINICAL = {
    name: DEMO[name]
    for name in ("temperature", "max_prompt_length", "max_completion_length", "min_completion_length", "dtype")
}


def clinic_run(out: Path, **settings) -> list[dict]:
    "Train on the clinic; what was logged."
    flags = DEMO | dict(output_dir=out, reward_weights=[1], report_to="none", disable_tqdm=True) | settings
    return train(as_flags(flags)).state.log_history


def scores(*models, **settings) -> list[tuple]:  # One per model
    rows = evaluate(
        *(map(str, (*models, "")[:2])),
        EvalArguments(
            reward_model_name_or_path=str(CLINIC / "reward"),
            validation_file_dir=str(CLINIC / "unseen.jsonl"),
            per_device_eval_batch_size=64,
            disable_tqdm=True,
            **CLINICAL | settings,
        ),
    )
    return [*zip(*(row["scores"] for row in rows))]


@pytest.mark.parametrize("sampled", [True, False])
def test_eval_finds_what_the_run_found(tmp_path, sampled):
    log = clinic_run(
        tmp_path,
        max_steps=1,
        batch_size=8,
        per_device_train_batch_size=8,
        learning_rate=0.02,
        max_eval_samples=40,
        eval_do_sample=sampled,
        seed=3,
    )
    before, after = (e["eval_reward"] for e in log if "eval_reward" in e)
    tuned, base = scores(tmp_path, CLINIC/"policy", max_eval_samples=40, do_sample=sampled, seed=3)
    assert before != after
    assert mean(base) == pytest.approx(before, abs=1e-4) and mean(tuned) == pytest.approx(after, abs=1e-4)


@pytest.mark.slow
def test_a_demo_run_beats_its_base(tmp_path):
    clinic_run(tmp_path, max_steps=40, do_eval=False)
    tuned, base = scores(tmp_path, CLINIC/"policy", do_sample=True)
    assert win_rate(tuned, base).low > .5 and mean_interval([a - b for a, b in zip(tuned, base)]).low > 0
