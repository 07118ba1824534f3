"What `rlhf_nb.plan` says, against what is."
import sys
from dataclasses import replace
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session", autouse=True)
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


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("critic", ["shared", "detached", "adapter"])
def test_more_takes_more(named, kind, critic):
    device = CPU if kind == "cpu" else GPUS["T4"]
    alive = lambda phase, **settings: plan(named, PPOConfig(critic=critic, batch_size=8, **settings), device).phases[phase]
    assert alive("update", mini_batch_size=8)["activations"] > alive("update", mini_batch_size=2)["activations"]
    assert alive("update", mini_batch_size=8)["activations"] > alive("update", mini_batch_size=8, gradient_checkpointing=True)["activations"]
    assert alive("write", max_target_length=400)["cache"] > alive("write")["cache"] > alive("write", rollout_batch_size=2)["cache"]
    assert alive("score")["activations"] > alive("score", reward_batch_size=1)["activations"]


@linux
@pytest.mark.parametrize("name", ["small, LoRA", "small, use_peft False"])
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
