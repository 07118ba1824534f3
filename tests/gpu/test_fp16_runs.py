"Runs in float16 on the device: updates are made, and a resumed run is the uninterrupted one."
import math

import pytest
import torch

from . import conftest
from .runs import make

CRITICS = dict(
    shared={},
    detached=dict(critic="detached"),
    adapter=dict(critic="adapter", gradient_checkpointing=True),
    full=dict(use_peft=False, learning_rate=1e-4),
)
TOLERANCE = 1e-3 # On a real GPU, of weights: sums there have no fixed order


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters() if p.requires_grad}


def check(trainer, updates: int):
    "Everything is on the GPU, and every update was made."
    assert trainer.state.global_step == updates
    assert trainer.accelerator.device.type == "cuda"
    assert {p.device.type for p in trainer.policy.parameters()} == {"cuda"}
    reward_model = trainer.reward_funcs[0].model
    assert {(p.device.type, p.dtype) for p in reward_model.parameters()} == {("cuda", torch.float16)}
    assert {p.dtype for p in trainer.policy.parameters() if p.requires_grad} == {torch.float32}
    assert trainer.accelerator.scaler.get_scale() >= 2**10
    assert trainer.last("val/skipped_updates") == 0
    assert trainer.last("policy/optimizer_steps") == 4
    for name in ("loss/policy_avg", "loss/value_avg", "grad_norm", "objective/kl"):
        found = trainer.history(name)
        assert len(found) == updates and all(map(math.isfinite, found)), name
    assert all(norm > 0 for norm in trainer.history("grad_norm"))


@pytest.mark.parametrize("name", [pytest.param(c, marks=() if c == "adapter" else pytest.mark.slow) for c in CRITICS])
def test_a_resumed_run_is_the_uninterrupted_one(tiny, tmp_path, name):
    given = CRITICS[name]

    def run_of(folder, **more):
        trainer = make(tiny, tmp_path/folder, **given | more)
        scaler = trainer.accelerator.scaler # Its state must count within three updates
        scaler.load_state_dict(scaler.state_dict() | dict(scale=2.**12, growth_interval=8))
        return trainer
    whole = run_of("whole", max_steps=3)
    start = weights(whole)
    whole.train()
    check(whole, 3)
    first = run_of("parts")
    first.train()
    check(first, 2)
    resumed = run_of("parts", max_steps=3, resume_from_checkpoint=True)
    resumed.train()
    check(resumed, 3)
    most = 0. if conftest.PRETENDED else TOLERANCE
    ends = weights(whole), weights(resumed)
    for name, end in ends[0].items(): torch.testing.assert_close(ends[1][name], end, atol=most, rtol=most)
    assert any(not torch.equal(start[name], end) for name, end in ends[0].items())
    assert whole.last("policy/loss_scale") == 2**13
    for metric in ("reward", "policy/loss_scale", "grad_norm"):
        assert resumed.last(metric) == pytest.approx(whole.last(metric), rel=most, abs=0), metric


def test_an_update_whose_gradient_overflows_is_made_again_with_a_smaller_scale(tiny, tmp_path):
    trainer = make(tiny, tmp_path, max_steps=6, save_steps=0)
    scaler = trainer.accelerator.scaler
    scaler.load_state_dict(scaler.state_dict() | dict(scale=2.**40))
    trainer.train()
    assert trainer.accelerator.scaler.get_scale() < 2.**40
    assert trainer.last("policy/loss_scale") == trainer.accelerator.scaler.get_scale()
    assert trainer.last("val/skipped_updates") < 6 and trainer.last("policy/optimizer_steps") > 0


@pytest.mark.real
@pytest.mark.parametrize("bits", ["load_in_8bit", "load_in_4bit"])
def test_a_run_with_quantized_weights(tiny, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    trainer = make(tiny, tmp_path, save_steps=0, **{bits: True})
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.last("val/skipped_updates") == 0
    assert all(norm > 0 for norm in trainer.history("grad_norm"))
