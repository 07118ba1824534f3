"The report: what it reads from the folder of a run, what it says and draws."
import io
import json
import re
import time
from contextlib import redirect_stderr
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from rich.console import Console
from transformers import TrainerControl, TrainerState

from rlhf_nb import page as report
from rlhf_nb.config import PPOConfig
from rlhf_nb.diagnosis import Doctor, Finding
from rlhf_nb.hub import run_settings
from rlhf_nb.metrics import HEADLINES, TRUE_REWARD
from rlhf_nb.page import Run, page, write_report
from rlhf_nb.report import Block, Lines

ATTACK = "<script>document.title = 'attacked'</script>"
ANSWERS = [ATTACK, "多喝水，早点睡。", "Drink water. " * 40, "https://example.com/" + "long" * 100,
           "\u202eright to left"]
KEYS = ["reward", "reward_std", "rewards/true_reward/mean", "rewards/other/mean", "objective/kl", "entropy",
        "objective/kl_coef",
        "policy/clipfrac_avg", "grad_norm", "loss/value_avg", "val/explained_variance", "completions/mean_length",
        "completions/clipped_ratio",
        "learning_rate", "episode", "time/rollout", "time/score", "time/step"]
EVALUATED = [f"eval_{key}" for key in ("reward", "objective/kl", "entropy", "completions/mean_length",
                                       "completions/clipped_ratio",
                                       "rewards/true_reward/mean", "rewards/other/mean")]
RISING = [{"step": i, "reward": i / 2, "objective/kl": i / 4} for i in range(1, 41)]


def leave(folder: Path, seed: int, updates: int = 100, rows: int = 200) -> Path:
    "What a run leaves in its folder, with random numbers."
    rng = np.random.default_rng(seed)
    def entry(keys, step): return dict(zip(keys, rng.random(len(keys)).tolist()), step=step)
    history = [entry(EVALUATED, 0), *(entry(KEYS, i) for i in range(1, updates + 1)), entry(EVALUATED, updates)]
    (folder/"completions").mkdir(parents=True)
    (folder/"trainer_state.json").write_text(json.dumps(dict(log_history=history, global_step=updates,
                                                             max_steps=updates)))
    settings = run_settings(PPOConfig(seed=seed, lam=.5, report_to="none", adap_kl_ctrl=True))
    (folder/"run.json").write_text(json.dumps(dict(settings=settings, model=dict(policy=ATTACK, parameters=10 ** 9))))
    for step in (0, updates):
        table = pd.DataFrame(dict(step=step, prompt=[f"{i}: {ATTACK}" for i in range(rows)],
                                  completion=rng.choice(ANSWERS, rows),
                                  reward=rng.normal(size=rows), true_reward=rng.random(rows), kl=rng.random(rows),
                                  length=9, ended=True))
        table.to_parquet(folder/"completions"/f"eval_{step:05d}.parquet")
    return folder


@pytest.fixture
def out(tmp_path) -> Path: return leave(tmp_path/"short", 0, updates=6, rows=24)


@pytest.fixture
def run(out) -> Run: return report.read_run(out)


def table(rewards, true) -> pd.DataFrame:
    return pd.DataFrame(dict(prompt=list("abcdef"), completion=list("ABCDEF"), reward=rewards, true_reward=true))


@pytest.fixture
def pair(run) -> Run:
    "A run with six completions before and after."
    return run._replace(before=table([0.] * 6, [1.] * 6), after=table([-1., 5., 2., 3., 1., None],
                                                                      [1., .5, 1., 1., 1., 1.]))


def test_a_long_log_costs_no_more_per_entry_than_a_short_one():
    "100,000 entries, then 300 more: what reads the whole log for each of them takes 20 ms an entry or more."
    keys = [*HEADLINES, "reward_std", TRUE_REWARD, "policy/clipfrac_avg", "completions/mean_length"]
    entries = [{"step": i, **{key: i + .5 for key in keys}} for i in range(100_301)]
    args = PPOConfig(report_to="none")
    state = TrainerState(max_steps=200_000, is_world_process_zero=True, log_history=entries[:100_000])
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=40)
    views = [Lines(), Block(lambda: None, console), Doctor()]
    with redirect_stderr(io.StringIO()):
        for view in views: view.on_train_begin(args, state, TrainerControl())
        for view in views: view.on_log(args, state, TrainerControl())
        start = time.process_time()
        for entry in entries[100_000:]:
            state.log_history.append(entry)
            for view in views: view.on_log(args, state, TrainerControl())
        spent = time.process_time() - start
        for view in views: view.on_train_end(args, state, TrainerControl())
    assert spent < 300 * .005


def test_the_newest_state_is_read(out):
    own, older = out/"trainer_state.json", out/"checkpoint-3"/"trainer_state.json"
    whole = own.read_text()
    older.parent.mkdir()
    older.write_text(json.dumps(json.loads(whole) | dict(global_step=3)))
    assert report.read_state(out)["global_step"] == 6
    own.write_text(older.read_text())
    older.write_text(whole)
    assert report.read_state(out)["global_step"] == 6
    own.write_text("{")
    with pytest.raises(ValueError, match="trainer_state.json: not JSON"): report.read_state(out)
    own.unlink()
    assert report.read_state(out)["global_step"] == 6
    with pytest.raises(ValueError, match="completions holds no run"): report.read_state(out/"completions")


def test_what_a_run_left_is_read(run, out):
    assert (run.name, run.done, run.planned, run.settings["lam"]) == ("short", 6, 6, .5)
    assert len(run.before) == 24 and [*run.before.prompt] == [*run.after.prompt] and run.before.step[0] == 0
    assert run.after.step[0] == 6
    last = out/"completions"/"eval_00006.parquet"
    last.write_text("cut sh")
    with pytest.raises(ValueError, match="eval_00006.parquet is damaged"): report.read_run(out)
    run.after.drop(columns="reward").to_parquet(last)
    with pytest.raises(ValueError, match="eval_00006.parquet has no column reward"): report.read_run(out)
    run.after[::-1].reset_index().to_parquet(last)
    assert report.read_run(out).before is None
    run.after.to_parquet(last)
    (out/"completions"/"eval_00009.parquet").write_text("cut sh")
    pd.testing.assert_frame_equal(report.read_run(out).after,
                                  run.after), "what a resumed run left of later updates is not read"


def test_paths_of_the_machine_are_left_out(out):
    about = json.loads((out/"run.json").read_text())
    (out/"run.json").write_text(json.dumps(about | dict(model=dict(policy=str(out), rewards=[str(out/"reward")]),
                                                        data=dict(dataset_name=str(out)))))
    about = report.read_run(out).about
    assert about["model"] == dict(policy="short", rewards=["reward"]) and about["data"] == dict(dataset_name="short")


def test_numbers_and_durations():
    assert [*map(report.number, (0., -0., .5842, 29.95, 1818.4, 1.5e-5))] == ["0", "0", "0.584", "29.9", "1,818",
                                                                              "1.5e-05"]
    assert [*map(report.duration, (1.23, 119, 3600, 9000))] == ["1.2 s", "119 s", "60 min", "2.5 h"]


def test_an_entry_counts_for_the_updates_since_the_one_before():
    history = [{"step": 2, "time/step": 1., "time/rollout": 3.}, {"step": 2, "eval_reward": 0.},
               {"step": 6, "time/step": 2., "time/rollout": 3.}]
    assert report.phases(history) == dict(step=10., rollout=18.) and report.phases(RISING) == {}


def test_the_verdict(run):
    assert report.verdict(run._replace(history=RISING, done=40, planned=60)) == (
        "In 40 of 60 updates the reward of training batches rose from 1.25 to 19.2, "
        "at a KL of 9.62 nats per completion.")
    gamed = [{"eval_reward": 1., "eval_rewards/true_reward/mean": .5},
             {"eval_reward": 2., "eval_rewards/true_reward/mean": .25}]
    assert report.verdict(run._replace(history=gamed)) == (
        "In 6 updates the reward on 24 validation prompts rose from 1 to 2 but the true reward fell from 0.5 to 0.25.")
    longer = [{"reward": 1., "completions/mean_length": 3., "step": 1}] * 2
    assert report.verdict(run._replace(history=longer)) == (
        "In 6 updates the reward of training batches stayed at 1; the length of a completion stayed at 3 tokens.")


def test_a_picture_is_part_of_the_page():
    def paint(axis): axis.plot([0, 1], [.0012, .0025], color=report.color(0))
    svg = report.picture(paint, 'up & "away"', "a b")
    assert "var(--c0)" in svg and "http" not in svg and "font-family" not in svg and "0.0012" in svg
    assert 'aria-label="up &amp; &quot;away&quot;"' in svg
    assert {*re.findall(r"#([\w-]+)", svg)} == {*re.findall(r' id="([^"]+)"', svg)}
    assert svg == report.picture(paint, 'up & "away"', "a b")


def test_what_changed_has_a_curve(run):
    constant = [entry | ({"learning_rate": 1.} if "reward" in entry else {}) for entry in run.history]
    shown = report.curve_panels([run._replace(history=constant)])
    assert {"reward", "true reward", "KL, nats per completion", "completion length, tokens",
            "clip fraction, share"} <= {*shown}
    assert "learning rate" not in shown and "reward other" not in shown
    several = [{"step": i, "reward": i, "rewards/kind/mean": i, "rewards/brief/mean": -i, "learning_rate": 1.}
               for i in range(3)]
    assert report.curve_keys([run._replace(history=several)]) == ["reward", "rewards/kind/mean", "rewards/brief/mean"]
    assert [*report.curve_panels([run._replace(history=several)])] == ["reward", "reward kind", "reward brief"]


def test_reward_against_kl(run):
    assert report.pairs(RISING, "objective/kl", "reward", 2).tolist() == [[10.5, 2.625, 5.25], [30.5, 7.625, 15.25]]
    assert report.pairs(RISING, "objective/kl", "nothing").shape == (0, 3)
    panels = report.kl_panels([run._replace(history=RISING)])
    assert [*panels] == ["reward"] and "short: 0.5 at 0.25, later 20 at 10" in panels["reward"]
    assert [*report.kl_panels([run])] == ["reward", "true reward"]
    both = report.kl_panels([run, run._replace(name="other", history=RISING)])
    assert "other: " in both["reward"] and "other: " not in both["true reward"], "one of two has no true reward"


def test_histograms(pair, run):
    assert report.finite(pair.after.reward).tolist() == [-1., 5., 2., 3., 1.]
    assert [*report.histograms([pair])] == ["reward: mean 0 before, 2 after", "true reward: mean 1 before, 0.917 after"]
    assert [*report.histograms([run._replace(before=None, after=None)])] == []


@pytest.mark.parametrize("before, after, marked", [
    ("Drink water.", "Drink warm tea.", ("Drink <del>water</del>.", "Drink <ins>warm tea</ins>.")),
    ("不好说。", "不要紧。", ("不<del>好说</del>。", "不<ins>要紧</ins>。")),
    ("不好说。", "多喝温水。不好请看医生。", ("<del>不好说</del>。", "<ins>多喝温水。不好请看医生</ins>。")),
    ("a <b> c", "a", ("a<del> &lt;b&gt; c</del>", "a")),
    ("same", "same", ("same", "same"))])
def test_what_changed_is_marked(before, after, marked): assert report.marked(before, after) == marked


def test_marks_lose_nothing(run):
    for texts in zip(run.before.completion, run.after.completion):
        plain = [" ".join(Markup.escape(x).striptags().split()) for x in texts]
        assert [Markup(m).striptags() for m in report.marked(*texts)] == plain
    old, new = "e, " * 700, "e e, " * 400
    assert report.marked(old, new)[1] == Markup("<ins>{}</ins>").format(new), "compared as a whole"


def test_which_completions_are_shown(pair):
    ordered = {1: "Greatest gain in reward", 3: "Upper quartile", 2: "Median", 4: "Lower quartile",
               0: "Greatest loss in reward"}
    assert report.chosen(pair) == ordered
    pair.after["true_reward"] = [1., 1., 1., 1., 1., .9]
    assert [*report.chosen(pair).items()][-1] == (5, "Greatest loss in true reward")
    unchanged = report.chosen(pair._replace(after=pair.before))
    assert [*unchanged.values()] == [*ordered.values()][:4] + ["Least gain in reward"]
    assert [*report.chosen(pair._replace(before=table([None] * 6,
                                                      [1.] * 6))).values()] == ["Greatest loss in true reward"]
    assert report.chosen(pair._replace(after=None)) == {}
    shown = page([pair], [[]]).partition('<article class="card"><h3>Greatest gain in reward</h3>')[2]
    texts = re.findall(r'<p class="(\w+)"[^>]*>(.*?)</p>', shown.partition("</article>")[0])
    assert texts == [("prompt", "b"), ("answer", "B"), ("facts", "reward 0 · true reward 1"),
                     ("answer", "B"), ("facts", "reward 5 · true reward 1")]
    whole = page([pair._replace(after=pair.after.assign(ended=False, kl=.5, length=9))], [[]])
    assert '<p class="facts">reward 5 · true reward 1 · KL 0.5 · 9 tokens · did not end</p>' in whole


def test_settings(run):
    other = run._replace(about=dict(settings=dict(run.settings, lam=.9, later=1)))
    assert [s.name for s in report.setting_rows([run, other]) if s.differs] == ["lam", "later"]
    by_name = {s.name: s for s in report.setting_rows([run])}
    assert by_name["lam"][1:] == ([.5], .95, "GAE lambda: 0 trusts the critic, 1 the rewards")
    assert by_name["lam"].changed
    assert not by_name["gamma"].changed
    assert not {"output_dir", "report_to", "label_smoothing_factor"} & {*by_name}, "no places, nothing unsupported"


def test_what_an_update_costs(run):
    timed = run._replace(done=2, history=[{"step": 2, "time/step": 3., "time/score": 1.}])
    slower = run._replace(done=1, history=[{"step": 1, "time/step": 8.}])
    assert report.costs([timed, slower, run._replace(history=RISING)]) == [
        dict(step=(3., .75, .375), score=(1., .25, .125), together=(4., 1., .5)), dict(step=(8., 1., 1.),
                                                                                       together=(8., 1., 1.)), {}]


def test_runs_side_by_side(run):
    two = [run._replace(name="a"), run._replace(name="b", history=RISING)]
    shown = page(two, [[], []]).partition('<section id="comparison">')[2].partition("</table>")[0]
    titles = re.findall('<th scope="col">(.*?)</th>', shown)
    rows = [re.findall("<td>(.*?)</td>", row) for row in shown.split('<th scope="row">')[1:]]
    a, b = (dict(zip(titles[1:], cells, strict=True)) for cells in rows)
    assert (b["reward"], b["true reward"]) == ('<b>19.2</b><span class="hidden"> best</span>', "")
    assert (a["updates"], b["updates"]) == ("6", "6")
    true = re.fullmatch('<b>(.+)</b><span class="hidden"> best</span>', a["true reward"])[1]
    assert report.headline(two) == (
        f"Of 2 runs, b ends with the highest reward, 19.2, and a with the highest true reward, {true}.")
    assert report.headline([two[1], two[1]]) == "Of 2 runs, b ends with the highest reward, 19.2."
    assert report.headline([run]) == report.verdict(run)


def test_values_are_written_as_a_person_does(run):
    html = page([run._replace(about=dict(extra=dict(rewards=["a", "b"], trained=98433, train_prompts=None)))], [[]])
    assert "<dt>extra</dt><dd>rewards a, b; trained 98,433; train prompts None</dd>" in html


def test_nothing_that_a_model_or_a_folder_says_is_markup(run):
    attack = "</style><script>alert(1)</script><img src=x onerror=alert(1)>"
    about = dict(settings={"lam": attack}, model={attack: [attack]}, extra=attack)
    hostile = run._replace(name=attack, after=run.after.assign(completion=attack), about=about)
    html = page([run, hostile], [[], [Finding(attack, attack, attack, attack, 3)]])
    assert "<script" not in html and "<img" not in html and html.count("</style>") == 1
    assert html.count("&lt;script&gt;") > 10
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len({*ids}) and {*re.findall(r'(?:href="|url\()#([^")]+)', html)} <= {*ids}
    assert re.findall(r"https?:(?!//example.com)|@import|(?:href|src)=\"[^#]", html) == [], "nothing outside the file"
    assert len(re.findall("<svg[^>]*role=\"img\"[^>]*aria-label=\"[^\"]", html)) == html.count("<figure>")


def test_what_a_run_did_not_leave_is_said(run):
    bare = page([run._replace(history=RISING, about={}, before=None, after=None)], [None])
    for text in ("<code>--do_eval</code>", "Not known: the folder has no run.json", "None: the folder has no run.json",
                 "The log has no times",
                 "of training batches rose"): assert text in bare, text
    assert "Side by side" not in bare and "Nothing found" not in bare and "Nothing found" in page([run], [[]])
    with pytest.raises(ValueError, match="findings has 2 entries for 1 runs"): page([run], [[], []])


def test_a_file_is_written(run, out):
    made = write_report([out], out/"pages"/"report.html")
    assert "In 6 updates" in made.read_text(encoding="utf-8")
    far = [{"reward": 1., "objective/kl": 90., "completions/mean_length": 9., "step": i} for i in range(1, 7)]
    assert [f.name for f in report.findings_of(run._replace(history=far))] == ["runaway KL"]
    assert report.findings_of(run._replace(about={})) is None
    with pytest.raises(ValueError, match="short is named twice"): write_report([out, out], out/"r.html")
    with pytest.raises(ValueError, match="pages holds no run"): write_report([out, out/"pages"], out/"r.html")
