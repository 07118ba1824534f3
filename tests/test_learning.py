"Does the policy become better, by a reward that it never sees?"
import json
import sys
from pathlib import Path
from statistics import mean

import pytest
from conftest import ROOT

from rlhf_nb.cli import demo
from rlhf_nb.clinic import accuracy, clinic_models, train_clinic
from rlhf_nb.diagnosis import diagnose

sys.path.insert(0, str(ROOT/"bench"))
from learning import CONTROLS, PEERS, best_of, course, first_at, peer, ppo, smooth, unseen  # noqa: E402

SEEDS = range(5)


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    "The demo with five seeds: true reward before and after, and the course of each."
    runs = []
    for seed in SEEDS:
        trainer = ppo(tmp_path_factory.mktemp("seed"), seed=seed)
        trainer.train()
        runs.append((unseen(trainer), course(trainer)))
        assert not diagnose(trainer.state.log_history, vars(trainer.args))
    return runs


@pytest.mark.slow
def test_the_demo_learns_and_says_so(tmp_path, capsys):
    short = ["--disable_tqdm", "--max_steps", "25", "--max_eval_samples", "100"]
    trainer = demo(["--output_dir", str(tmp_path/"demo"), *short])
    before, after = unseen(trainer)
    assert before <= .65 and after >= before + .15 and trainer.last("objective/kl") > 1
    out = capsys.readouterr().out
    assert all(text in out for text in ("Answers to unseen questions", "true reward", "curves.png"))
    assert not diagnose(trainer.state.log_history, vars(trainer.args))
    rewards = json.loads((tmp_path/"demo"/"run.json").read_text())["model"]["rewards"]
    assert [Path(name).name for name in rewards] == ["reward"], "the true reward has no weight"
    summary = json.loads((tmp_path/"demo"/"summary.json").read_text())
    assert {"true_reward", "reward", "kl", "completion_length", "tokens_per_second", "seconds"} <= set(summary)
    assert summary["true_reward"] == dict(before=before, after=after) and summary["kl"]["before"] == 0
    assert (tmp_path/"demo"/"curves.png").read_bytes()[:4] == b"\x89PNG"


def test_what_ships_is_small_and_good():
    assert sum(f.stat().st_size for f in (ROOT/"data"/"clinic").rglob("*") if f.is_file()) < 6e6
    assert accuracy(clinic_models()[1], 500) >= .88


@pytest.mark.slow
def test_the_benchmark_is_ready(tmp_path):
    trainer = ppo(tmp_path/"ppo", max_steps=1, do_eval=False, **CONTROLS["constant"])
    trainer.train()
    ours = course(trainer)
    theirs, reward = peer("RLOO", tmp_path/"rloo", max_steps=1)
    assert trainer.last("reward") == 0 and ours["rollouts"] == theirs["rollouts"] == [64] and .4 < reward < .7


def test_rollouts_until_a_level():
    rising = dict(rollouts=[*range(10, 210, 10)], seconds=[*range(20)], true_reward=[i / 20 for i in range(20)])
    assert smooth(rising)["rollouts"][0] == 100
    assert smooth(rising)["true_reward"] == pytest.approx([i / 20 + .225 for i in range(11)])
    assert (first_at(rising, .5), first_at(rising, .9)) == (160, float("inf"))


def test_controls_change_the_scores():
    shuffled, constant = (CONTROLS[name]["change"] for name in ("shuffled", "constant"))
    assert sorted(shuffled(lambda **batch: [1, 2, 3])()) == [1, 2, 3]
    assert constant(None)(prompts=["a", "b"]) == [0, 0]


def test_best_of_n_is_better_than_one(tmp_path):
    trainer = ppo(tmp_path, max_steps=1, max_eval_samples=40)
    assert best_of(trainer, 4) > best_of(trainer, 1) + .1


@pytest.mark.slow
def test_five_seeds(seeds):
    before, after = zip(*(run[0] for run in seeds))
    assert mean(before) <= .6 and mean(after) >= .9 and min(after) >= .85, (before, after)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTROLS)
def test_controls_learn_nothing(name, tmp_path):
    trainer = ppo(tmp_path, **CONTROLS[name])
    trainer.train()
    before, after = unseen(trainer)
    assert abs(after - before) <= .05, (before, after)


@pytest.mark.slow
def test_without_a_kl_penalty_the_reward_model_is_exploited(tmp_path):
    trainer = ppo(tmp_path, max_steps=300, beta=0., eval_steps=15, lr_scheduler_type="constant")
    trainer.train()
    true, score = unseen(trainer), trainer.history("eval_reward")
    best = true.index(max(true))
    assert true[best] >= .85 and min(true[best:]) <= true[best] - .15 and max(score[best:]) > score[best], (true, score)


@pytest.mark.slow
def test_as_few_rollouts_as_the_better_peer(seeds, tmp_path):
    theirs = [mean(first_at(peer(name, tmp_path/name, seed)[0]) for seed in range(3)) for name in PEERS]
    assert mean(first_at(run[1]) for run in seeds) <= min(theirs)


@pytest.mark.slow
def test_a_rebuild_is_as_good_as_what_ships(tmp_path):
    policy, reward = train_clinic(tmp_path, seed=1)
    assert accuracy(reward) >= .9
    trainer = ppo(tmp_path/"run", model_name_or_path=policy, reward_model_name_or_path=reward)
    trainer.train()
    before, after = unseen(trainer)
    assert before <= .65 and after >= .85
