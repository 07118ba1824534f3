"Strategies alone, with a loss by hand, and what they refuse."
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import patch_environment
from test_shards import FSDP

from rlhf_nb import PPOConfig
from rlhf_nb.distributed import FSDP2, from_exchange, make_strategy
from rlhf_nb.models import ActorCritic
from rlhf_nb.testing import tiny_policy

STEPS = """
import math
import sys
import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from rlhf_nb import PPOConfig
from rlhf_nb.distributed import make_strategy
from rlhf_nb.models import ActorCritic, Sampling, Tokens
from rlhf_nb.testing import tiny_policy

args = PPOConfig(sys.argv[1], bf16=False, report_to="none", ddp_timeout=77)
accelerator = Accelerator()
policy = ActorCritic(tiny_policy("llama", seed=accelerator.process_index)[0], reference=False)
strategy = make_strategy(policy, accelerator, args)
strategy.prepare_optimizer(torch.optim.AdamW(policy.parameters(), lr=.01, eps=1e-3))
world, rank, sharded = accelerator.num_processes, accelerator.process_index, strategy.in_step

def add_gradients(step): # Without LoRA, of four rows; the value head learns from the first two
    ids = torch.randint(5, 90, (2, 4, 6), generator=torch.Generator().manual_seed(step))
    query, response = ids.to(accelerator.device)
    for i in range(4 // world * rank, 4 // world * (rank + 1)):
        row = Tokens(query[i:i + 1], torch.ones_like(query[:1]), response[i:i + 1], torch.ones_like(query[:1]))
        out = policy(row, Sampling(), values=i < 2 or sharded)
        loss = -out.logprobs.sum() + (out.values.square().sum() if i < 2 else out.values.sum() * 0 if sharded else 0)
        strategy.backward(loss / 24)

norms, steps = [], []
for step, max_norm in enumerate([0., .5, .5, 0.]):
    strategy.zero_grad()
    if step == 2: # Not finite in one process
        with strategy.passes():
            add_gradients(9)
            if not rank: strategy.trained[0].grad.mul_(math.nan)
        steps.append(strategy.step(max_norm)[1])
    with strategy.passes(): add_gradients(step)
    norm, made = strategy.step(max_norm)
    norms.append(round(norm, 4))
    steps.append(made)
x = torch.arange(2 * (rank + 1)).view(2, -1) + 10 * rank
whole = strategy.weights() or policy.state_dict()
state = strategy.optimizer_state(keep=not rank)
moments = sum(float(s["exp_avg"].abs().sum()) for s in state["state"].values()) if not rank else None
weights = sum(float(p.double().abs().sum()) for p in whole.values())
with strategy.gathered(): local = sum(p.numel() for p in policy.parameters())
print("SEEN", [type(strategy).__name__, norms, steps, round(weights, 2), moments and round(moments, 3), local])
print("GATHER", [y.tolist() for y in (strategy.gather(x), strategy.gather(x, left=True), strategy.gather(x[:, 0]))])
print("OF ALL", [strategy.any(rank == 1), strategy.any(False), strategy.sum(torch.tensor(rank + 1)).item()])
if world > 1:
    held = sum((p.to_local() if sharded else p).numel() for p in policy.parameters())
    timeout = torch.distributed.group.WORLD._get_backend(accelerator.device).options._timeout
    print("HELD", [held / local, timeout.total_seconds()])
PartialState().destroy_process_group()
"""


def told(said, name): return [eval(line.removeprefix(name)) for line in said.splitlines() if line.startswith(name)]


@pytest.mark.parametrize("kind, env, share", [("Strategy", {}, 1), ("FSDP2", FSDP, .5)])
def test_two_processes_step_like_one(together, tmp_path, kind, env, share):
    name, norms, steps, *sums = told(together(tmp_path, code=STEPS, world=1), "SEEN")[0]
    assert name == "Strategy" and steps == [True, True, False, True, True]
    said = together(tmp_path, code=STEPS, env=env)
    for rank, seen in enumerate(told(said, "SEEN")):
        assert seen[0] == kind and seen[2] == steps and seen[1] == pytest.approx(norms, rel=1e-4)
        assert (seen[4] is None) == (rank == 1) and seen[3] == pytest.approx(sums[0], rel=1e-5) and seen[5] == sums[2]
        assert rank or seen[4] == pytest.approx(sums[1], rel=1e-4)
    for by_right, by_left, column in told(said, "GATHER"):
        assert by_right == [[0, 0], [1, 0], [10, 11], [12, 13]] and by_left == [[0, 0], [0, 1], [10, 11], [12, 13]]
        assert column == [0, 1, 10, 12]
    assert told(said, "OF ALL") == [[True, False, 3]] * 2
    assert told(said, "HELD") == [[pytest.approx(share, abs=.01), 77]] * 2


def make():
    "A strategy of one process, and its policy."
    args = PPOConfig("out", bf16=False, report_to="none", use_cpu=True)
    policy = ActorCritic(tiny_policy("llama")[0], reference=False)
    return make_strategy(policy, Accelerator(cpu=True), args), policy


@pytest.mark.parametrize("env, text", [
    (dict(FSDP_VERSION="1"), "FSDP 1 is not supported"),
    (dict(FSDP_OFFLOAD_PARAMS="true"), "offload_params"),
    (dict(FSDP_RESHARD_AFTER_FORWARD="false"), "reshard_after_forward"),
    (dict(FSDP_ACTIVATION_CHECKPOINTING="true"), "gradient_checkpointing"),
    (dict(FSDP_AUTO_WRAP_POLICY="SIZE_BASED_WRAP", FSDP_MIN_NUM_PARAMS="1000"), "layer by layer")])
def test_kinds_of_fsdp_that_are_refused(env, text):
    with patch_environment(**FSDP | env), pytest.raises(ValueError, match=text):
        FSDP2(None, SimpleNamespace(state=None), PPOConfig("out", report_to="none", use_cpu=True))


def test_an_optimizer_of_other_weights_is_refused():
    (strategy, _), (_, other) = make(), make()
    with pytest.raises(ValueError, match="its weights are not those of the policy"):
        strategy.prepare_optimizer(torch.optim.SGD(other.parameters()))


def test_in_one_process_nothing_is_exchanged():
    strategy, policy = make()
    x = torch.arange(6).view(2, 3)
    assert strategy.sum(x) is x and strategy.gather(x) is x and strategy.any(True) and not strategy.any(False)
    assert strategy.weights() is None and not strategy.in_step and strategy.policy is policy


def test_an_error_of_our_own_is_none_of_an_exchange():
    for error in (RuntimeError("Connection closed by peer"), ValueError("timed out")):
        try: raise error
        except Exception as e: assert not from_exchange(e)
