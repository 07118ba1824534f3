"Every tensor of an update is where the policy is, and a user's scores may be anywhere."
import pytest
import torch

from rlhf_nb.learner import make_experience
from rlhf_nb.ppo import RunningMoments, token_rewards
from rlhf_nb.rewards import Scores
from rlhf_nb.testing import tiny_run

from .runs import devices, make, settings


@pytest.fixture(scope="module")
def trainer(tiny, tmp_path_factory):
    return make(tiny, tmp_path_factory.mktemp("run"), save_steps=0, per_device_train_batch_size=4)


@pytest.fixture
def rollout(trainer):
    return trainer.rollout(trainer.train_dataset.to_list()[:8])


def test_tensors_of_an_update(trainer, rollout, monkeypatch):
    assert devices(rollout) == {"cuda"}
    scores = trainer.score(rollout)
    assert devices(scores._replace(extra={})) == {"cuda"}
    seen = []
    update = trainer.learner.update

    def noted(exp, *args, **kwargs):
        seen.append(exp)
        result = update(exp, *args, **kwargs)
        seen.append(result)
        return result
    monkeypatch.setattr(trainer.learner, "update", noted)
    stats = trainer.step(rollout, scores)
    experience, result = seen
    for name, part in experience._asdict().items(): assert devices(part) == {"cuda"}, name
    assert devices(result.ratios) == {"cuda"} and devices(stats) == set()
    state = trainer.optimizer.state_dict()["state"]
    moments = [x for of_weight in state.values() for name, x in of_weight.items() if name != "step"]
    assert moments and devices(moments) == {"cuda"}


@pytest.mark.parametrize("given", ["list", "tensor", "scores", "per_token"])
def test_scores_of_a_user_may_be_on_the_cpu(trainer, rollout, given):
    numbers = [float(i) for i in range(8)]
    per_token = torch.ones(rollout.logprobs.shape) if given == "per_token" else None
    scores = dict(
        list=numbers,
        tensor=torch.tensor(numbers),
        scores=Scores(torch.tensor(numbers), {"mine": torch.tensor(numbers)}),
        per_token=Scores(torch.tensor(numbers), {}, per_token=per_token),
    )[given]
    stats = trainer.step(rollout, scores)
    assert stats["reward"] == pytest.approx(3.5)
    assert stats["policy/optimizer_steps"] > 0


@pytest.mark.parametrize("scaled", [False, True])
def test_experience_of_scores_on_the_cpu(rollout, scaled, tiny, tmp_path):
    _, _, args = settings(tiny, tmp_path, use_score_scaling=scaled)
    total = torch.arange(8.)
    experience, shaped = make_experience(rollout, Scores(total, {}), args, .1, RunningMoments())
    assert devices([*experience, shaped]) == {"cuda"}
    again, _ = make_experience(rollout, Scores(total.cuda(), {}), args, .1, RunningMoments())
    assert torch.equal(experience.advantages, again.advantages)


def test_token_rewards_of_scores_on_the_cpu():
    kl, mask = torch.ones(2, 3, device="cuda"), torch.tensor([[1., 1., 0.], [1., 1., 1.]], device="cuda")
    found = token_rewards(torch.tensor([1., 2.]), kl, mask, .5)
    assert found.device.type == "cuda" and found.tolist() == [[-.5, .5, 0], [-.5, -.5, 1.5]]


def test_a_reward_function_may_return_tensors_of_any_device():
    def on_gpu(completions, **columns): return torch.ones(len(completions), device="cuda")
    def on_cpu(completions, **columns): return torch.ones(len(completions))
    run = tiny_run(reward_funcs=[on_gpu, on_cpu], use_cpu=False, fp16=True, bf16=None, max_steps=1)
    run.train()
    assert run.last("reward") == 2 and run.accelerator.device.type == "cuda"
