"No code from data, no secrets in what is written, no control codes on the screen."
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from rich.console import Console
from safetensors.torch import load_file
from test_cli import run, short

from rlhf_nb.checkpoint import PICKLES
from rlhf_nb.report import samples_table


class Code:
    def __init__(self, mark): self.mark = mark

    def __reduce__(self): return os.system, (f"touch {self.mark}",)


def with_bin_weights(source, folder, **more):
    shutil.copytree(source, folder)
    weights = folder/"model.safetensors"
    torch.save(load_file(weights) | more, folder/"pytorch_model.bin")
    weights.unlink()
    return folder


def test_bin_weights_are_read_but_their_code_is_not_run(tiny, tmp_path, capsys):
    policy, reward = tiny
    run(*short(policy, with_bin_weights(reward, tmp_path/"good"), tmp_path/"run", "--max_steps", 1))
    mark = tmp_path/"mark"
    for name, flags in (("reward", (policy, with_bin_weights(reward, tmp_path/"bad_reward", x=Code(mark)))),
                        ("policy", (with_bin_weights(policy, tmp_path/"bad_policy", x=Code(mark)), reward))):
        with pytest.raises(SystemExit) as stop: run(*short(*flags, tmp_path/"out"))
        err = capsys.readouterr().err
        assert (
            stop.value.code == 2
            and f"bad_{name}" in err
            and "would run code" in err
            and not mark.exists()
            and not (tmp_path / "out").exists()
        )


def test_a_pickle_in_a_checkpoint_is_refused(tiny, tmp_path, capsys):
    run(*short(*tiny, tmp_path/"run", "--max_steps", 1))
    assert not [p for p in (tmp_path/"run").rglob("*") if p.suffix in PICKLES]
    torch.save({}, tmp_path/"run"/"checkpoint-1"/"optimizer.pt")
    with pytest.raises(SystemExit) as stop:
        run(*short(*tiny, tmp_path / "run", "--resume_from_checkpoint", tmp_path / "run" / "checkpoint-1"))
    assert stop.value.code == 2 and "optimizer.pt may be a pickle" in capsys.readouterr().err


def test_yaml_makes_no_objects(tiny, tmp_path, capsys):
    mark, config = tmp_path/"mark", tmp_path/"run.yaml"
    config.write_text(f"batch_size: !!python/object/apply:os.system ['touch {mark}']")
    with pytest.raises(SystemExit) as stop: run(*short(*tiny, tmp_path/"out", "--config", config))
    assert stop.value.code == 2 and "run.yaml" in capsys.readouterr().err and not mark.exists()


def test_what_is_written_holds_no_secret_and_no_home(tiny, tmp_path):
    home = tmp_path/"home-of-somebody"
    home.mkdir()
    for name, source in zip(("policy", "reward"), tiny): shutil.copytree(source, home/name)
    flags = [str(f) for f in short("policy", "reward", home/"out", "--max_steps", 1)]
    env = os.environ | dict(
        HOME=str(home),
        HF_TOKEN="hf_secretsecretsecret",
        WANDB_API_KEY="anothersecretanothersecret",
        OMP_NUM_THREADS="1",
    )
    done = subprocess.run([Path(sys.executable).parent/"rlhf-nb", *flags], cwd=home, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    written = [p for p in (home/"out").rglob("*") if p.is_file()]
    assert {p.name for p in written} >= {"manifest.json", "trainer_state.json", "README.md", "adapter_config.json"}
    assert any("tfevents" in p.name for p in written)
    assert b"secretsecret" not in done.stdout + done.stderr
    for path in written:
        assert not any(
            secret in path.read_bytes() for secret in (b"home-of-somebody", b"secretsecret", str(ROOT).encode())
        ), path


def test_what_a_model_wrote_cannot_steer_the_terminal():
    console = Console(record=True, width=120, file=open(os.devnull, "w"))
    console.print(
        samples_table("Answers", dict(answer=["\x1b[2J\x1b]0;title\x07[bold red]big[/] \u202e \x9b2J <script>"]))
    )
    text = console.export_text()
    assert not any(c in text for c in "\x1b\x07\u202e\x9b") and "[bold red]" in text
    assert "<script>" not in console.export_html()


def test_code_that_comes_with_models_is_announced(tiny, tmp_path, caplog):
    run(*short(*tiny, tmp_path/"run", "--max_steps", 1, "--trust_remote_code"))
    assert "trust_remote_code: code that comes with the models is run" in caplog.text
