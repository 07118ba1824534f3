"What only the critic has: its learning rate, its targets, and what it learns before the first rollout."
import json
import sys

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from torch.testing import assert_close

from rlhf_nb.config import PPOConfig
from rlhf_nb.diagnosis import diagnose
from rlhf_nb.errors import RunError
from rlhf_nb.ppo import gae
from rlhf_nb.testing import tiny_run

sys.path.insert(0, str(ROOT/"bench"))
import critic  # noqa: E402

QUIET = dict(max_steps=1, num_iterations=1, adap_kl_ctrl=False)
# The number of letters e in the output is its reward, so a critic can know it from the prompt
ANSWERS = Dataset.from_list(
    [dict(prompt=f"Say {n}.", output="eee e eee"[:n]) for n in (1, 3, 5, 7, 9) for _ in range(8)]
)
TALK = ANSWERS.map(lambda row: dict(prompt=[dict(role="user", content=row["prompt"])]))


def changed(trainer, before):
    "Names of weights that differ."
    return {name for name, p in trainer.policy.named_parameters() if not torch.equal(p, before[name])}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def of_critic(name):
    return not {"critic", "value_head"}.isdisjoint(name.split("."))


@pytest.mark.parametrize("arch, critic", [
    ("llama", "shared"), ("qwen3", "detached"), ("gemma3", "adapter"), ("bloom", "adapter"),
])
def test_the_critic_learns_before_the_first_rollout(arch, critic, monkeypatch):
    trainer = tiny_run(arch, data=ANSWERS, critic=critic, critic_pretraining_steps=6, critic_learning_rate=.02,
                       learning_rate=1e-9, vf_coef=1., cliprange_value=None, use_score_scaling=True,
                       use_score_norm=True, **QUIET)
    before, seen = weights(trainer), {}
    monkeypatch.setattr(trainer, "rollout", lambda rows: seen.update(moved=changed(trainer, before)) or 1 / 0)
    with pytest.raises(ZeroDivisionError): trainer.train()
    assert seen["moved"] and all(map(of_critic, seen["moved"]))
    assert any("critic" in name.split(".") for name in seen["moved"]) == (critic == "adapter")
    assert trainer.policy.critic == critic, "shared again, where it was shared"
    assert trainer.optimizer.param_groups[-1]["lr"] == .02, "as the schedule has it"


def test_what_it_learns_is_the_reward(caplog):
    caplog.set_level("INFO")
    settings = dict(critic="adapter", critic_learning_rate=.01, vf_coef=1., cliprange_value=None,
                    use_score_scaling=True, use_score_norm=True, **QUIET)
    trainer = tiny_run("llama", data=ANSWERS, critic_pretraining_steps=60, **settings)
    trainer.train()
    text = next(line for line in caplog.messages if "has learned" in line)
    assert "1920 completions" in text and float(text.split()[-1]) > .5


def test_the_run_is_dealt_the_same_prompts():
    plain, pretrained = (tiny_run(data=ANSWERS, critic_pretraining_steps=n, **QUIET) for n in (0, 2))
    dealt = []
    for trainer in (plain, pretrained):
        rollout = trainer.rollout
        trainer.rollout = lambda rows, rollout=rollout: dealt.append(rows) or rollout(rows)
        trainer.train()
    assert dealt[0] == dealt[1]


def test_messages():
    trainer = tiny_run(data=ANSWERS, critic_pretraining_steps=1, **QUIET)
    trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    rollout = trainer.sampler.given([*TALK.select([0, 39])])
    assert rollout.completions == ["e", "eee e eee"] and rollout.ended.all() and not rollout.sampling_logprobs.any()
    assert_close(rollout.logprobs, rollout.ref_logprobs)
    trainer.rewards.funcs = [lambda prompts, completions, **_: [float(len(c[0]["content"])) for c in completions]]
    assert trainer.score(rollout).total.tolist() == [1., 9.]


def test_a_long_output_is_cut_and_has_not_ended():
    trainer = tiny_run(data=ANSWERS, **QUIET)
    row = dict(prompt="Say it.", output="e " * 30)
    rollout = trainer.sampler.given([row])
    assert rollout.tokens.response_ids.shape[1] == 12 and not rollout.ended.any()


@pytest.mark.parametrize("output", [None, 3])
def test_a_row_without_an_output(output):
    with pytest.raises(ValueError, match="critic_pretraining_steps"):
        tiny_run(data=ANSWERS.remove_columns("output"), critic_pretraining_steps=1)
    trainer = tiny_run(data=ANSWERS, **QUIET)
    with pytest.raises(ValueError, match="needs an output; there is none for 'Say it.'"):
        trainer.sampler.given([dict(prompt="Say it.", output=output)])


def infinite(prompts, completions, **columns): return [float("inf")] + [0.] * (len(prompts) - 1)


@pytest.mark.parametrize("broken, problem", [(dict(reward_funcs=infinite), "scores are"), (dict(), "the loss is")])
def test_numbers_that_are_not_finite_end_the_run(broken, problem):
    trainer = tiny_run(data=ANSWERS, critic_pretraining_steps=1, use_score_scaling=True, **broken, **QUIET)
    def overflow(head, args, out): return out / 0 if out.requires_grad else out

    if not broken: trainer.policy.value_head.register_forward_hook(overflow)
    with pytest.raises(RunError, match=f"critic_pretraining_steps: {problem} not finite"): trainer.train()
    assert trainer.moments.n == (0 if broken else 32)


def test_a_resumed_run_does_not_learn_it_again(tmp_path, caplog):
    settings = QUIET | dict(critic_pretraining_steps=1, output_dir=str(tmp_path), save_strategy="steps", save_steps=1)
    caplog.set_level("INFO")
    tiny_run(data=ANSWERS, **settings).train()
    assert any("has learned" in line for line in caplog.messages)
    caplog.clear()
    tiny_run(data=ANSWERS, **settings | dict(max_steps=2)).train(resume_from_checkpoint=True)
    assert not any("has learned" in line for line in caplog.messages)


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_rates(critic):
    trainer = tiny_run("llama", critic=critic, critic_learning_rate=.5, weight_decay=.1, learning_rate=.1,
                       max_steps=2, num_iterations=1, lr_scheduler_type="linear")
    names = {p: name for name, p in trainer.policy.named_parameters()}
    for group in trainer.optimizer.param_groups:
        kinds = {of_critic(names[p]) for p in group["params"]}
        assert kinds == {group["lr"] == .5}, "weights of the policy, or of the critic"
    counted = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert counted == sum(p.requires_grad for p in trainer.policy.parameters())
    trainer.train()
    assert trainer.history("learning_rate") == [.1, .05]
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.}


def test_a_schedule_of_the_users_has_no_rate_for_the_critic():
    trainer = tiny_run(critic_learning_rate=.2, **QUIET)
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    with pytest.raises(ValueError, match="critic_learning_rate does not go with a schedule"):
        trainer.create_optimizer()


def test_targets_of_the_critic(monkeypatch):
    seen = []
    for settings in (dict(), dict(critic_lam=1.), dict(critic_lam=.5)):
        trainer = tiny_run(lam=.9, normalize_advantages=False, **settings, **QUIET)
        torch.nn.init.normal_(trainer.policy.value_head.weight, generator=torch.Generator().manual_seed(0))
        monkeypatch.setattr(trainer.learner, "update", lambda exp, *a, **k: seen.append(exp) or 1 / 0)
        with pytest.raises(ZeroDivisionError): trainer.train()
    same, to_go, short = seen
    mask = same.mask.float()
    assert_close(same.returns, (same.advantages + same.values) * mask)
    assert_close(to_go.returns, to_go.to_go * mask)
    for exp in seen:
        assert_close(exp.advantages, same.advantages)
        assert_close(exp.to_go, same.to_go)
    rewards = same.to_go - torch.nn.functional.pad(same.to_go[:, 1:], (0, 1))
    assert_close(short.returns, gae(rewards, same.values, mask, 1., .5)[1])
    assert (short.returns - same.returns).abs().max() > .01


def test_a_rate_of_its_own_for_the_pretraining(monkeypatch):
    trainer = tiny_run(data=ANSWERS, critic_learning_rate=.1, critic_pretraining_steps=2,
                       critic_pretraining_learning_rate=.4, learning_rate=1e-3, **QUIET)
    rates, step = [], trainer.strategy.step
    def spy(max_norm):
        rates.append(trainer.optimizer.param_groups[-1]["lr"])
        return step(max_norm)

    monkeypatch.setattr(trainer.strategy, "step", spy)
    trainer.train()
    assert rates[:3] == [.4, .2, .1], "falling, then that of the run"


def test_one_optimizer_step_takes_the_whole_batch(monkeypatch):
    trainer = tiny_run(data=ANSWERS, critic_pretraining_steps=3, per_device_train_batch_size=2, num_iterations=2,
                       max_steps=1)
    steps, update = [], trainer.learner.update
    def spy(exp, *args, **settings):
        found = update(exp, *args, **settings)
        steps.append((len(exp.values), found.stats["policy/optimizer_steps"], settings.get("once", False)))
        return found

    monkeypatch.setattr(trainer.learner, "update", spy)
    trainer.train()
    n = trainer.args.generation_batch_size
    assert steps == [(n, 1, True)] * 3 + [(n, 2 * n / 2, False)]


def test_a_rate_without_steps():
    with pytest.raises(ValueError, match="critic_pretraining_learning_rate needs critic_pretraining_steps"):
        tiny_run(data=ANSWERS, critic_pretraining_learning_rate=.1)


@pytest.mark.parametrize("trainer, settings", [
    (critic.Oracle, {}), (critic.Gate, {}), (critic.GroupMean, dict(num_generations=8)),
])
def test_the_benchmark_of_critics_is_ready(trainer, settings):
    run = critic.sorting(0, trainer, updates=2, **critic.UNTAUGHT | settings)
    assert run["rollouts"] == [64, 128] and len(run["explained"]) == 2 and .05 < run["true_reward"][0] < .6
    assert (run["explained"][0] > .3) == (trainer is critic.Oracle)


def test_the_benchmark_learns_a_critic_once(monkeypatch):
    monkeypatch.setattr(critic, "KNOWN", {})
    def run(**settings):
        made = critic.sorting(0, updates=2, critic_pretraining_steps=2, **settings)
        return made["explained"], made["true_reward"]

    assert run() == run() and len(critic.KNOWN) == 1
    run(critic_lam=None)
    assert len(critic.KNOWN) == 2


def test_a_peer_with_several_passes_has_as_many_entries():
    run = critic.sorting(0, critic.RLOOTrainer, updates=2, learning_rate=1e-3, **critic.AS_OFTEN)
    assert run["rollouts"] == [64, 128] and len(run["true_reward"]) == 2


def test_a_run_of_the_benchmark_is_claimed(tmp_path):
    file = tmp_path/"a.json"
    assert critic.claim(file) and not critic.claim(file)
    file.with_suffix(".claim").write_text("4194305") # No process has this number
    assert critic.claim(file), "its owner is gone"
    file.touch()
    file.with_suffix(".claim").write_text("4194305")
    assert not critic.claim(file), "it is there"


def test_the_benchmark_gathers(tmp_path):
    run = dict(world="clinic", name="PPO", seed=3, rollouts=[32, 64], true_reward=[.12345, 1], seconds=[1., 2.4],
               explained=[None, None], unseen=.9)
    (tmp_path/"a.json").write_text(json.dumps(run))
    kept = dict(true_reward=[.123, 1], batch=32, seconds=2, unseen=.9)
    assert critic.gather(tmp_path) == dict(clinic=dict(PPO={3: kept}))


@pytest.mark.slow
def test_a_pretrained_critic_knows_from_the_first_update_on():
    run = critic.sorting(20, updates=8)
    assert sum(run["explained"]) / 8 > .25 and run["true_reward"][-1] > run["true_reward"][0] + .15


@pytest.mark.parametrize("lam, explained, said", [
    (1., -.8, True), (1., -.3, False), (.95, -.1, True), (.95, .1, False),
])
def test_the_diagnosis_names_a_critic_that_explains_nothing(lam, explained, said, tmp_path):
    settings = PPOConfig(str(tmp_path), lam=lam, max_steps=90, use_cpu=True, bf16=False).to_dict()
    history = [{"step": i, "reward": i % 3, "val/explained_variance": explained} for i in range(1, 31)]
    assert ("blind critic" in {f.name for f in diagnose(history, settings)}) == said
    for n, most in ((29, 90), (30, 300), (19, -1)):
        assert not diagnose(history[:n], settings | dict(max_steps=most)), "too early to say"
    assert ("blind critic" in {f.name for f in diagnose(history, settings | dict(max_steps=-1))}) == said
