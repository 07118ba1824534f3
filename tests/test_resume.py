"Killed, stopped, out of memory, out of disk, fed with NaN: what is left is right."
import json
import math
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from peft import LoraConfig
from test_cli import short
from transformers import IntervalStrategy, TrainerCallback

from rlhf_nb import files
from rlhf_nb.checkpoint import damage
from rlhf_nb.config import PPOConfig
from rlhf_nb.program import main
from rlhf_nb.rewards import RewardModel
from rlhf_nb.testing import tiny_policy
from rlhf_nb.trainer import PPOTrainer


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path):
    kills = 100
    run = subprocess.run(
        [sys.executable, ROOT / "tests" / "kill.py", tmp_path / "runs", str(kills), "0"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["kills"] == kills and found["while_writing"] > 0
    print(found)


def length(completions, **columns): return [float(len(c)) for c in completions]


def make(out, reward=length, callbacks=None, **settings):
    "A run of seconds, from the same start each time."
    model, tok = tiny_policy("llama", initializer_range=.2)
    prompts = Dataset.from_dict({"prompt": [f"Question {i}?" for i in range(9)]})
    kw = dict(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=4,
        num_iterations=2,
        max_completion_length=8,
        min_completion_length=4,
        temperature=0.8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        beta=0.2,
        adap_kl_ctrl=True,
        save_steps=2,
        logging_steps=1,
        log_completions=True,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        use_cpu=True,
        seed=1,
    )
    return PPOTrainer(model, reward, PPOConfig(**kw | settings), prompts, processing_class=tok, callbacks=callbacks,
                      peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def weights(trainer): return [p.detach().clone() for p in trainer.strategy.trained]


def equal(a, b): return len(a) == len(b) and all(map(torch.equal, a, b))


def untimed(trainer):
    return [{k: v for k, v in entry.items() if not k.startswith(("time", "tokens_per", "step_time", "train_"))}
            for entry in trainer.state.log_history if "train_runtime" not in entry]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    "A run that nothing happened to."
    trainer = make(tmp_path_factory.mktemp("straight")/"run")
    trainer.train()
    return trainer


class At(TrainerCallback):
    "Does something at the end of one update."
    def __init__(self, step, do): self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step: self.do()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_update_and_the_trainer_goes_on(tmp_path, straight, number, caplog):
    trainer = make(tmp_path/"run", callbacks=[At(1, lambda: signal.raise_signal(number))])
    trainer.train()
    assert (
        trainer.state.global_step == 1
        and trainer.stopped_by == number
        and damage(tmp_path / "run" / "checkpoint-1") is None
    )
    assert "stopping after this update" in caplog.text
    assert (
        signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        and signal.getsignal(signal.SIGINT) == signal.default_int_handler
    )
    other = make(tmp_path/"run")
    other.train(resume_from_checkpoint=True)
    trainer.train()
    for finished in (trainer, other):
        assert equal(weights(finished), weights(straight)) and untimed(finished) == untimed(straight)


def test_the_second_signal_does_not_wait_and_the_trainer_can_go_on(tmp_path):
    trainer = make(tmp_path/"run")
    plain = trainer.learner.passes
    def twice(*args):
        if trainer.state.global_step == 1 and trainer.learner.passes is twice:
            trainer.learner.passes = plain
            for _ in range(2): signal.raise_signal(signal.SIGINT)
        return plain(*args)
    trainer.learner.passes = twice
    with pytest.raises(KeyboardInterrupt): trainer.train()
    assert trainer.state.global_step == 1
    trainer.train()
    assert trainer.state.global_step == 4 and all(p.isfinite().all() for p in trainer.strategy.trained)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_programs_exit_status(tiny, tmp_path, monkeypatch, number, status):
    step = PPOTrainer.step
    def interrupted(self, *args):
        signal.raise_signal(number)
        return step(self, *args)
    monkeypatch.setattr(PPOTrainer, "step", interrupted)
    with pytest.raises(SystemExit) as stop:
        main([str(f) for f in short(*tiny, tmp_path / "run", "--save_steps", 100, "--log_with", "none")])
    assert stop.value.code == status and damage(tmp_path/"run"/"checkpoint-1") is None


def broken_at(update, what):
    "A reward function that misbehaves once."
    calls = []
    def reward(prompts, completions, **columns):
        calls.append(1)
        return what(completions) if len(calls) == update else length(completions)
    reward.__name__ = "length" # In the log
    return reward


def test_a_score_that_is_not_finite_costs_one_update(tmp_path, caplog):
    for bad in (math.inf, -math.inf):
        before = []
        trainer = make(
            tmp_path / f"{bad}",
            broken_at(2, lambda c: [bad] + length(c)[1:]),
            [At(1, lambda: before.extend(weights(trainer)))],
            max_steps=2,
        )
        trainer.train()
        assert equal(before, weights(trainer)) and trainer.history("val/skipped_updates") == [0, 1]
        assert "Update 2 is skipped: scores are not finite" in caplog.text and "for the prompt 'Question" in caplog.text
        assert all(math.isfinite(v) for entry in trainer.state.log_history for v in entry.values())


@pytest.mark.parametrize(
    "name, what", [("logprobs", "log-probs"), ("ref_logprobs", "the reference's log-probs"), ("values", "values")]
)
def test_a_rollout_that_is_not_finite_teaches_nothing(tmp_path, name, what, caplog):
    trainer = make(tmp_path)
    before, answers = weights(trainer), trainer.rollout(["one", "two", "three", "four"])
    wrong = getattr(answers, name).clone(); wrong[0, 0] = math.nan
    stats = trainer.step(answers._replace(**{name: wrong}), [1., 2., 3., 4.])
    assert (
        equal(before, weights(trainer))
        and stats["val/skipped_updates"] == 1
        and f"{what} are not finite" in caplog.text
    )
    trainer.step(answers, [1., 2., 3., 4.])
    assert not equal(before, weights(trainer)) and trainer.skips.in_a_row == 0 and trainer.skips.total == 1


def test_a_loss_or_gradient_that_is_not_finite_teaches_nothing(tmp_path, caplog):
    trainer = make(tmp_path, adap_kl_ctrl=False)
    before, answers = weights(trainer), trainer.rollout(["one", "two", "three", "four"])
    trainer.step(answers, [1e30, 2e30, 3e30, 4e30])
    assert equal(before, weights(trainer)) and "the loss is not finite" in caplog.text
    hook = trainer.strategy.trained[0].register_hook(lambda grad: grad * math.nan)
    trainer.step(answers, [1., 2., 3., 4.])
    hook.remove()
    assert (
        equal(before, weights(trainer)) and "the gradient is not finite" in caplog.text and trainer.skips.in_a_row == 2
    )


def test_several_skipped_updates_in_a_row_end_the_run(tiny, tmp_path, monkeypatch, capsys):
    rewards = RewardModel.__call__
    monkeypatch.setattr(
        RewardModel, "__call__", lambda self, *args, **kw: [math.inf for _ in rewards(self, *args, **kw)]
    )
    with pytest.raises(SystemExit) as stop:
        main(
            [
                str(f)
                for f in short(*tiny, tmp_path / "run", "--max_steps", 9, "--save_steps", 100, "--log_with", "none")
            ]
        )
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        stop.value.code == 1
        and "3 updates in a row were skipped; in update 1 scores are not finite" in said
        and "checkpoint-3" in said
    )
    assert damage(tmp_path/"run"/"checkpoint-3") is None


def no_memory_above(trainer, rows, after=0):
    "The policy runs out of memory with more rows than these, but for some calls; the sizes that were tried."
    forward, tried = trainer.policy.forward, []
    def limited(tokens, *args, **kw):
        tried.append(len(tokens.query_ids))
        if len(tokens.query_ids) > rows and len(tried) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")
        return forward(tokens, *args, **kw)
    trainer.policy.forward = limited
    return tried


def test_out_of_memory_the_same_update_in_smaller_passes(tmp_path, straight, caplog):
    trainer = make(tmp_path/"run")
    tried = no_memory_above(trainer, 1)
    trainer.train()
    for a, b in zip(weights(trainer), weights(straight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert [entry["completions/mean_length"] for entry in untimed(trainer)] == [
        entry["completions/mean_length"] for entry in untimed(straight)
    ]
    assert (
        tried.count(4) == 2
        and tried.count(2) == 2
        and "4 rows at a time: 2 from now on; per_device_train_batch_size=2" in caplog.text
    )


def test_out_of_memory_halfway_through_a_gradient(tmp_path, straight):
    settings = dict(max_steps=1, save_strategy="no", adam_epsilon=.1, learning_rate=.1)
    trainer = make(tmp_path/"run", per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    tried = no_memory_above(trainer, 1, after=3)
    trainer.train()
    plain = make(tmp_path/"plain", **settings)
    plain.train()
    assert tried == [4, 4, 2, 2] + [1] * 8
    for a, b in zip(weights(trainer), weights(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_out_of_memory_with_one_answer_is_the_end(tiny, tmp_path, monkeypatch, capsys):
    def full(*args, **kw): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")
    monkeypatch.setattr("rlhf_nb.models.ActorCritic.forward", full)
    with pytest.raises(SystemExit) as stop: main([str(f) for f in short(*tiny, tmp_path/"run", "--log_with", "none")])
    assert stop.value.code == 1 and "Out of memory with one row at a time. What helps: " in capsys.readouterr().err


def test_a_reward_function_that_fails_leaves_a_checkpoint(tmp_path, straight):
    def raises(completions): raise ConnectionError("judge is down")

    for name, what, settings in (
        ("raises", raises, {}),
        ("short", lambda c: [1.0], {}),
        ("hangs", lambda c: time.sleep(30), dict(reward_timeout=0.5)),
    ):
        reward = broken_at(4, what)
        with pytest.raises(ValueError, match="prompt.*'Question"): make(tmp_path/name, reward, **settings).train()
        assert damage(tmp_path/name/"checkpoint-3") is None
        resumed = make(tmp_path/name)
        resumed.train(resume_from_checkpoint=True)
        assert equal(weights(resumed), weights(straight)) and untimed(resumed) == untimed(straight)


def test_a_full_disk_ends_the_run_and_spares_the_last_checkpoint(tmp_path, straight):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    full = At(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1])))
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written .*; earlier checkpoints are as they were"):
            make(tmp_path/"run", callbacks=[full]).train()
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(p.name for p in (tmp_path/"run").iterdir()) == ["checkpoint-2", "completions"]
    resumed = make(tmp_path/"run")
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed), weights(straight))


def test_a_damaged_checkpoint_is_passed_over(tmp_path, straight, caplog):
    make(tmp_path/"run").train()
    newest = tmp_path/"run"/"checkpoint-4"/"adapter_model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = make(tmp_path/"run")
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is passed over: adapter_model.safetensors is damaged" in caplog.text
    assert equal(weights(resumed), weights(straight)) and damage(tmp_path/"run"/"checkpoint-4") is None


def test_saved_models_are_replaced_file_by_file(tmp_path):
    trainer = make(tmp_path/"run", max_steps=1)
    trainer.train()
    trainer.save_model()
    before = (tmp_path/"run"/"adapter_model.safetensors").read_bytes()
    def fails(folder): raise OSError("No space left on device")
    trainer.processing_class.save_pretrained = fails
    trainer.strategy.trained[0].data += 1
    with pytest.raises(OSError): trainer.save_model()
    assert (tmp_path/"run"/"adapter_model.safetensors").read_bytes() == before and not [*(tmp_path/"run").glob("tmp-*")]


def test_what_the_checkpoint_keeps_is_said(tmp_path, caplog):
    make(tmp_path/"run", max_steps=2).train()
    make(tmp_path/"run", max_steps=3, learning_rate=1e-3).train(resume_from_checkpoint=True)
    assert "learning_rate was 0.01, is 0.001 in this call; the checkpoint's value is kept" in caplog.text


def test_an_evaluation_that_fails_loses_nothing(tmp_path, straight):
    prompts = Dataset.from_dict({"prompt": ["Why?"]})
    def fails_there(prompts, completions, **columns):
        if prompts == ["Why?"]: raise ConnectionError("judge is down")
        return length(completions)
    trainer = make(tmp_path/"run", fails_there, save_strategy="no")
    trainer.eval_dataset, trainer.args.eval_strategy, trainer.args.eval_steps = prompts, IntervalStrategy.STEPS, 3
    with pytest.raises(ValueError, match="judge is down"): trainer.train()
    assert damage(tmp_path/"run"/"checkpoint-3") is None
    resumed = make(tmp_path/"run")
    resumed.train(resume_from_checkpoint=True)
    assert equal(weights(resumed), weights(straight))


def test_weights_that_are_not_finite_are_found_while_writing(tmp_path, caplog):
    trainer = make(tmp_path)
    trainer.strategy.trained[1].data.fill_(math.nan)
    stats = trainer.step(answers := trainer.rollout(["one", "two", "three", "four"]), [1., 2., 3., 4.])
    assert stats["val/skipped_updates"] == 1 and answers.tokens.response_ids.max() < len(trainer.processing_class)
    assert "log-probs are not finite" in caplog.text


def test_a_run_that_goes_on_from_an_earlier_step_sets_later_checkpoints_aside(tmp_path, caplog):
    make(tmp_path/"run").train()
    make(tmp_path / "run", save_total_limit=1, save_steps=1, max_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2")
    )
    assert sorted(p.name for p in (tmp_path/"run").glob("*checkpoint-*")) == ["checkpoint-3", "set-aside-checkpoint-4"]
    assert "is called set-aside-checkpoint-4 from now on" in caplog.text


def test_the_seed_is_the_checkpoints(tmp_path, straight):
    make(tmp_path/"run", max_steps=2).train()
    other = make(tmp_path/"run", seed=7)
    other.train(resume_from_checkpoint=True)
    assert equal(weights(other), weights(straight))


def test_answers_of_updates_that_are_done_again_go(tmp_path):
    make(tmp_path).train()
    steps = lambda: sorted({int(p.stem.split("_")[1]) for p in (tmp_path/"completions").glob("*.parquet")})
    assert max(steps()) == make(tmp_path).args.max_steps
    trainer = make(tmp_path)
    files.load_checkpoint(trainer, tmp_path/"checkpoint-2")
    assert max(steps()) == 2


def test_overwriting_leaves_nothing_of_the_earlier_model(tmp_path):
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    (tmp_path/"mine.txt").touch()
    files.clear_output_dir(make(tmp_path, overwrite_output_dir=True))
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} <= {
        "mine.txt",
        "README.md",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert not list(tmp_path.glob("checkpoint-*")) and not list((tmp_path/"completions").iterdir())
