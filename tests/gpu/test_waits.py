"""How often the host waits for the GPU. Each wait leaves it idle; the numbers may only fall.

After a change that saves waits, lower the number. A failure names the lines that wait, with how often each does.
"""
from collections import Counter

import pytest
import torch

from rlhf_nb.decoding import generate_static
from rlhf_nb.learner import make_experience
from rlhf_nb.models import Sampling
from rlhf_nb.rollout import Generation, generate

from .runs import make
from .waits import listed, waits

pytestmark = pytest.mark.pretended
WAITS = {
    "token, generate": 1,
    "token, generate_static": .25, # Two for every look, which is every 8 tokens
    "micro-batch": 2,
    "optimizer step": 4.5, # One for the order of rows, which is every other step here
    "rollout": 27,
    "score": 15,
    "step": 63,
}


def check(what: str, found: Counter, times: int = 1):
    "At most as many as the table says."
    each = found.total() / times
    assert each <= WAITS[what], f"{each:g} waits per {what}, {WAITS[what]} are known:\n{listed(found)}"


@pytest.fixture(scope="module")
def trainer(tiny, tmp_path_factory):
    return make(tiny, tmp_path_factory.mktemp("run"), save_steps=0, per_device_train_batch_size=4)


def rows(trainer, n: int = 8) -> list[dict]:
    return trainer.train_dataset.to_list()[:n]


def sampled(trainer, length: int, eos: tuple[int, ...], method=generate) -> Counter:
    "Waits while completions of a length are sampled."
    policy = trainer.policy
    ids = torch.randint(60, 400, (4, 12), generator=torch.Generator().manual_seed(0)).cuda()
    uniforms = torch.rand(4, length, generator=torch.Generator().manual_seed(1)).cuda()
    generation = Generation(Sampling(1., 0, eos), length, 3)

    def work():
        with torch.no_grad(), trainer.strategy.autocast():
            method(policy, ids, torch.ones_like(ids), generation, uniforms)
    return waits(work)


@pytest.mark.parametrize("method", [generate, generate_static])
def test_per_sampled_token(trainer, method):
    few, many = (sampled(trainer, length, (10**6,), method) for length in (9, 25))
    check(f"token, {method.__name__}", many - few, 16)


@pytest.mark.parametrize("part", ["rollout", "score", "step"])
def test_per_update(trainer, part):
    rollout = trainer.rollout(rows(trainer))
    scores = trainer.score(rollout)
    work = dict(
        rollout=lambda: trainer.rollout(rows(trainer)),
        score=lambda: trainer.score(rollout),
        step=lambda: trainer.step(rollout, scores),
    )[part]
    work() # What is only once
    check(part, waits(work))


def test_per_optimizer_step_and_micro_batch(trainer, monkeypatch):
    rollout = trainer.rollout(rows(trainer))
    scores = trainer.score(rollout)
    experience, _ = make_experience(rollout, scores, trainer.args, .1, trainer.moments)

    def update(epochs: int, micro_batches: int) -> Counter:
        trainer.args.__dict__["num_iterations"] = epochs
        trainer.learner.limit = 4 // micro_batches
        return waits(lambda: trainer.learner.update(experience, trainer.sampler.sampling))
    before = trainer.args.num_iterations, trainer.learner.limit
    try:
        one, two, halved = update(1, 1), update(2, 1), update(1, 2)
    finally: trainer.args.__dict__["num_iterations"], trainer.learner.limit = before
    check("optimizer step", two - one, 2)
    check("micro-batch", halved - one, 2)
