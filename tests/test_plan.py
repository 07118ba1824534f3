"What `rlhf_nb.plan` says, against what is."
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf_nb.cli import main
from rlhf_nb.config import ModelArguments, PPOConfig
from rlhf_nb.models import load_policy
from rlhf_nb.plan import GPUS, Device, plan

from conftest import ROOT

sys.path.insert(0, str(ROOT/"bench"))
from plans import SETTINGS, planned_and_measured  # noqa: E402

CPU = Device("this machine", "cpu", 1e10, None, None, None, True)
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")


@pytest.fixture(scope="session")
def named(tiny): return ModelArguments(model_name_or_path=str(tiny[0]), reward_model_name_or_path=str(tiny[1]))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.mark.parametrize("of_model, critic", [({}, "shared"), (dict(lora_rank=3, target_modules="all-linear"), "adapter"), (dict(use_peft=False), "shared")])
def test_parameters_are_those_of_the_loaded_policy(named, of_model, critic):
    model_args = replace(named, **of_model)
    policy = load_policy(model_args)
    policy.use_critic(critic)
    found = plan(model_args, PPOConfig(critic=critic, torch_dtype="float32"), CPU).parameters
    copy = sum(p.numel() for p in policy.ref_lm.parameters()) if policy.ref_lm else 0
    assert found["trained"] == sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert found["policy"] == sum(p.numel() for p in policy.parameters()) - copy


@pytest.mark.parametrize("device", [CPU, GPUS["T4"]])
def test_more_takes_more(named, device):
    alive = lambda **settings: plan(named, PPOConfig(**dict(batch_size=8, mini_batch_size=8, max_source_length=64, max_target_length=64) | settings), device).phases
    first, smaller, longer = alive(), alive(mini_batch_size=2, rollout_batch_size=2, reward_batch_size=1), alive(max_target_length=200)
    assert first["update"]["activations"] > smaller["update"]["activations"]
    assert longer["write"]["cache"] > first["write"]["cache"] == 4 * smaller["write"]["cache"]
    assert first["score"]["activations"] > smaller["score"]["activations"]


@pytest.mark.parametrize("of_model, settings", [(dict(use_peft=False), {}), ({}, dict(critic="adapter")), ({}, dict(rollout_int8=True, torch_dtype="bfloat16")),
                                                ({}, dict(optim="adamw_8bit")), (dict(load_in_4bit=True), dict(ent_coef=.1))])
def test_what_a_run_may_be_set_to_can_be_planned(named, of_model, settings):
    for device in (CPU, GPUS["A100"]):
        found = plan(replace(named, **of_model), PPOConfig(max_source_length=16, max_target_length=16, **settings), device)
        assert found.peak > sum(found.parameters[m] for m in ("policy", "reward"))


def test_80_columns_are_enough(tiny, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    main(["plan", "--model_name_or_path", str(tiny[0]), "--reward_model_name_or_path", str(tiny[1]), "--gpu", "t4"])
    out = capsys.readouterr().out
    assert "fits T4" in out and max(len(line.rstrip()) for line in out.splitlines()) <= 80


@linux
@pytest.mark.parametrize("name", ["small, LoRA", pytest.param("small, use_peft False", marks=pytest.mark.slow)])
def test_within_15_per_cent_of_the_measured_peak_small(name, tmp_path_factory):
    check(name, tmp_path_factory)


@linux
@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SETTINGS if not n.startswith("small")])
def test_within_15_per_cent_of_the_measured_peak(name, tmp_path_factory):
    check(name, tmp_path_factory)


def check(name: str, tmp_path_factory):
    planned, measured, _ = planned_and_measured(name, tmp_path_factory.getbasetemp()/"models")
    assert .85 < planned / measured < 1.15, (planned / 1e9, measured / 1e9)
