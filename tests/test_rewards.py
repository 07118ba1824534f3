"Rewards: what models read, what functions get and may return, and how they are called."
import asyncio
import gc
import math
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn, tensor
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from rlhf_nb import rewards
from rlhf_nb.config import PPOConfig
from rlhf_nb.errors import RunError
from rlhf_nb.rewards import RewardModel, Rewards, Sample, holds_rewards, in_parts
from rlhf_nb.testing import policy_tokenizer, tiny_reward_model

QUESTIONS = ["Why?", "How often should I wash my hands?", "Fever"]
ANSWERS = ["Because.", "Before meals.", "Drink, rest, and see a doctor after three days."]


def rolled(prompts, completions, /, **columns):
    "A rollout without a policy; a completion has as many tokens as characters."
    width = max(map(len, completions))
    mask = (torch.arange(width) < tensor([[len(c)] for c in completions])).long()
    rows = [dict(prompt=p) | {name: values[i] for name, values in columns.items()} for i, p in enumerate(prompts)]
    return SimpleNamespace(
        rows=rows,
        prompts=prompts,
        completions=completions,
        tokens=SimpleNamespace(response_ids=torch.arange(width).repeat(len(prompts), 1), response_mask=mask),
    )


def make(*funcs, tokenizers=None, **settings):
    return Rewards(list(funcs), tokenizers, PPOConfig("out", report_to="none", **settings))


def overflows(tok):
    "A classifier whose activations leave float16's range, and not float32's."
    model = llama(tok)
    with torch.no_grad(): model.model.layers[0].mlp.up_proj.weight *= 5e5
    return model


def fails(text, func, prompts=("one", "two"), completions=("a", "bc"), **settings):
    with pytest.raises(ValueError) as e: make(func, **settings)(rolled(list(prompts), list(completions)))
    assert text in str(e.value), str(e.value)


def llama(tok, **more):
    shape = dict(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        pad_token_id=tok.pad_token_id,
    )
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(LlamaConfig(vocab_size=len(tok), **shape | more)).eval()


# What a model reads

def test_one_text_or_a_conversation_as_trl_encodes_them():
    tok = policy_tokenizer()
    tok.chat_template = "{% for m in messages %}{{m.role}}: {{m.content}}{{mark}}\n{% endfor %}"
    model = llama(tok)
    scores = make(model, tokenizers=tok, chat_template_kwargs=dict(mark="!"))
    talk = [[dict(role="user", content=q)] for q in QUESTIONS]
    chats = [
        tok.apply_chat_template(t + [dict(role="assistant", content=a)], tokenize=False, mark="!")
        for t, a in zip(talk, ANSWERS)
    ]
    for prompts, texts in ((QUESTIONS, [q + a for q, a in zip(QUESTIONS, ANSWERS)]), (talk, chats)):
        inputs = tok(text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        with torch.no_grad(): expected = model(**inputs).logits[:, 0]
        assert_close(scores(rolled(prompts, ANSWERS)).total, expected, rtol=0, atol=1e-5)


def test_a_model_reads_only_the_column_that_the_user_names():
    data = rolled(["### Instruction: " + q for q in QUESTIONS], ANSWERS, question=QUESTIONS, hint=["x", "y", "z"])
    model, tok = tiny_reward_model(initializer_range=.2)
    alone = RewardModel(model, tok)
    assert make(model, tokenizers=tok)(data).total.tolist() == pytest.approx(alone(data.prompts, ANSWERS), abs=1e-5)
    asked = make(model, tokenizers=tok, question_column="question")(data).total
    assert asked.tolist() == pytest.approx(alone(QUESTIONS, ANSWERS), abs=1e-5)
    assert not torch.allclose(asked, tensor(alone(data.prompts, ANSWERS)), atol=1e-3)
    own = make(RewardModel(model, tok), question_column="question", remove_unused_columns=True)(data).total
    assert_close(own, asked, rtol=0, atol=1e-5)


class Own(nn.Module):
    "A module that is no `PreTrainedModel`."
    def __init__(self, inner):
        super().__init__()
        self.inner, self.config = inner, SimpleNamespace(_name_or_path="org/own-model", num_labels=1)

    def forward(self, **inputs): return self.inner(**inputs)


def test_modules_of_all_kinds():
    tok = policy_tokenizer()
    model = llama(tok)
    adapted = get_peft_model(llama(tok), LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False))
    scores = make(model, Own(llama(tok)), torch.compile(llama(tok), backend="eager"), adapted, tokenizers=[tok] * 4)(
        rolled(QUESTIONS, ANSWERS)
    )
    assert [*scores.by_name] == [
        "LlamaForSequenceClassification",
        "own-model",
        "OptimizedModule",
        "PeftModelForSequenceClassification",
    ]
    plain, own, compiled, lora = scores.by_name.values()
    assert_close(own, plain)
    assert_close(compiled, plain)
    with torch.no_grad():
        expected = [
            adapted(tok(q + a, return_tensors="pt", add_special_tokens=False).input_ids).logits.item()
            for q, a in zip(QUESTIONS, ANSWERS)
        ]
    assert_close(lora, tensor(expected), rtol=0, atol=1e-5)
    assert not torch.allclose(lora, plain, atol=1e-3)


def test_named_models_and_the_tokenizers_given_for_them(tmp_path):
    tok = policy_tokenizer()
    llama(tok).save_pretrained(tmp_path/"llama")
    with pytest.raises((OSError, ValueError), match="tokenizer"): make(str(tmp_path/"llama"))
    one = make(str(tmp_path/"llama"), tokenizers=tok)
    assert one.names == ["llama"] and one.funcs[0].tokenizer is tok
    tok.save_pretrained(tmp_path/"llama")
    assert make(str(tmp_path/"llama"), bf16=True).funcs[0].model.dtype == torch.bfloat16
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path/"llama")
    assert make(loaded).funcs[0].tokenizer.get_vocab() == AutoTokenizer.from_pretrained(tmp_path/"llama").get_vocab()
    with pytest.raises(ValueError, match="reward_processing_classes has 1 entries for 2 rewards"):
        make(loaded, loaded, tokenizers=tok)


def test_equal_pairs_are_scored_once_and_less_memory_is_enough():
    read, room = [], [99]
    reward = RewardModel(*tiny_reward_model(), batch_size=2)

    def note(module, args, kwargs):
        if len(kwargs["input_ids"]) > room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate everything.")
        read.append(len(kwargs["input_ids"]))

    reward.model.register_forward_pre_hook(note, with_kwargs=True)
    together = reward(QUESTIONS, ANSWERS)
    assert reward(QUESTIONS * 2, ANSWERS * 2) == together * 2
    assert read == [2, 1, 1, 2, 1], "the second one looks whether padding changes a score"
    room[0] = 1
    assert reward(QUESTIONS, ANSWERS) == pytest.approx(together, abs=1e-5)
    assert reward.batch_size == 1
    room[0] = 0
    with pytest.raises(RuntimeError, match="Out of memory with one row at a time"): reward(QUESTIONS, ANSWERS)


# What a function gets

@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_model_that_overflows_in_16_bits_goes_on_in_float32(dtype, caplog):
    tok = policy_tokenizer()
    exact = RewardModel(overflows(tok), tok)(QUESTIONS, ANSWERS)
    assert all(map(math.isfinite, exact))
    reward = RewardModel(overflows(tok).to(dtype), tok, batch_size=2)
    assert reward(QUESTIONS, ANSWERS) == pytest.approx(exact, rel=.01)
    assert reward.model.dtype == torch.float32
    said = [r.message for r in caplog.records if "float32 from now on" in r.message]
    assert len(said) == (dtype == torch.float16) and all("in float16: its weights" in text for text in said)
    caplog.clear()
    reward(QUESTIONS[::-1], ANSWERS)
    assert not caplog.records


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", None])
def test_the_type_of_a_reward_model(dtype, tmp_path):
    model, tok = tiny_reward_model()
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    named, given = make(str(tmp_path), model.half(), tokenizers=[None, tok], reward_dtype=dtype, bf16=False).funcs
    wanted = torch.float32 if dtype is None else getattr(torch, dtype)
    assert named.model.dtype == wanted and given.model.dtype == (torch.float16 if dtype is None else wanted)


def test_arguments_are_those_of_trl():
    seen = {}

    def func(**kwargs):
        seen.update(kwargs)
        return [1.] * len(kwargs["prompts"])

    state = SimpleNamespace(global_step=3)
    make(func)(rolled(["one", "two"], ["a", "bc"], answer=[1, 2], completion=["x", "y"]), state)
    assert {*seen} == {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "answer"}
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (
        ["one", "two"],
        ["a", "bc"],
        [[0], [0, 1]],
    )
    assert seen["answer"] == [1, 2] and seen["trainer_state"] is state
    seen.clear()
    make(func, remove_unused_columns=True)(rolled(["one", "two"], ["a", "bc"], answer=[1, 2]))
    assert "answer" not in seen and "completion_ids" in seen
    talk = [[dict(role="user", content="Hi")]]
    make(func)(rolled(talk, ["Hello"]))
    assert seen["prompts"] == talk and seen["completions"] == [[dict(role="assistant", content="Hello")]]


def test_a_column_with_the_name_of_an_argument_loses_and_is_said_once(caplog):
    def func(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns):
        assert (
            completions == ["a"]
            and completion_ids == [[0]]
            and trainer_state is None
            and callable(log_extra)
            and not columns
        )
        return [1.]

    scores = make(func)
    data = rolled(
        ["one"], ["a"], completions=["x"], prompts=["x"], completion_ids=["x"], trainer_state=["x"], log_extra=["x"]
    )
    for _ in range(3): assert scores(data).total.tolist() == [1.]
    assert [r.getMessage() for r in caplog.records] == [
        "Reward functions get their own completion_ids, completions, log_extra, prompts, "
        "trainer_state; the data set's column of that name is left out"
    ]


def test_columns_of_a_data_set_arrive_as_they_are():
    data = Dataset.from_list([dict(prompt="a", level=1, note=None), dict(prompt="b", level=2, note="x")])
    rollout = rolled(data["prompt"][:], ["c", "d"])
    rollout.rows = list(data)

    def func(prompts, completions, level, note, **kwargs): return [n + (t is None) for n, t in zip(level, note)]
    assert make(func)(rollout).total.tolist() == [2., 2.]


# What it may return

@pytest.mark.parametrize(
    "returned",
    [[1, 2.0], (1, True), tensor([1.0, 2.0]), np.array([1, 2]), [tensor(1.0), np.float32(2)], [1, None], [1, math.nan]],
)
def test_scores_of_all_kinds(returned):
    total = make(lambda **kw: returned, lambda **kw: [0.0, 0.0], reward_weights=[2.0, 1.0])(
        rolled(["one", "two"], ["a", "bc"])
    ).total
    second = 0. if returned[1] is None or math.isnan(returned[1]) else 2. * float(returned[1])
    assert total.tolist() == [2., second] and total.dtype == torch.float32


def test_infinity_is_a_score_and_weight_zero_hides_it():
    def inf(**kw): return [1., math.inf]
    def ones(**kw): return [1., 1.]
    data = rolled(["one", "two"], ["a", "bc"])
    assert make(inf)(data).total.tolist() == [1., math.inf]
    assert make(inf, ones, reward_weights=[0., 1.])(data).total.tolist() == [1., 1.]
    assert not make(inf, inf, reward_weights=[1.0, -1.0])(data).total.isfinite().all(), (
        "and two that cancel out are not None"
    )
    assert not make(inf, inf, reward_weights=[1., -1.])(data).total.isnan().any()


def test_rows_that_no_function_scores(caplog):
    def none(**kw): return [None, 1.]
    def nan(**kw): return [math.nan, None]
    scores = make(none, nan, reward_baseline=.5)(rolled(["one", "two"], ["a", "bc"]))
    assert math.isnan(scores.total[0]) and scores.total[1] == .5
    assert_close(scores.by_name["nan"], tensor([math.nan, math.nan]), equal_nan=True)
    assert (
        "All reward functions returned None for the following kwargs: {'prompt': 'one'" in caplog.text
        and "(1 of 2 completions; functions: none, nan)" in caplog.text
    )
    zero = make(none, reward_weights=[0.0])(
        rolled(["one", "two"], ["a", "bc"])
    ).total  # It applies, and counts for nothing
    assert math.isnan(zero[0]) and zero[1] == 0.


def test_scores_per_token_are_as_wide_as_the_completions():
    def tokens(completion_ids, **kw): return [[1.] * len(ids) if len(ids) < 3 else None for ids in completion_ids]
    def one(**kw): return [1., 1., None]
    scores = make(tokens, one, reward_weights=[.5, 2.])(rolled(["a", "b", "c"], ["x", "yy", "zzz"]))
    assert scores.per_token.tolist() == [[.5, 0., 0.], [.5, .5, 0.], [0., 0., 0.]]
    assert scores.total[:2].tolist() == [2.5, 3.] and math.isnan(scores.total[2])
    assert make(one)(rolled(["a", "b", "c"], ["x", "yy", "zzz"])).per_token is None
    fails(
        "Reward few gave 1 numbers for the 2 tokens of a completion of the prompt 'two'",
        named("few", lambda **kw: [[1.0], [1.0]]),
    )
    nan = make(lambda **kw: [[math.nan], [1., 2.]])(rolled(["one", "two"], ["a", "bc"]))
    assert nan.total.tolist() == [math.inf, 3.]


def named(name, func):
    func.__name__ = name
    return func


@pytest.mark.parametrize("returned, text", [
    ([1.], "Reward f gave 1 scores for 2 prompts, the first of them 'one'"),
    (["good", 1.], "Reward f gave 'good' instead of a number for the prompt 'one'"),
    (["1", 1.], "Reward f gave '1' instead of a number"), ([[None], 1.], "Reward f gave None instead of a number"),
    (None, "Reward f gave a NoneType for 2 prompts"), (1., "Reward f gave a float for 2 prompts")])
def test_what_it_may_not_return(returned, text): fails(text, named("f", lambda **kw: returned))


def test_extra_columns_and_metrics():
    def func(prompts, completions, log_extra, log_metric, **kw):
        for c in completions: log_extra("length", [len(c)])
        log_metric("longest", tensor(max(map(len, completions))))
        return [1.] * len(prompts)

    def other(prompts, log_extra, log_metric, **kw):
        log_extra("upper", [p.upper() for p in prompts])
        log_metric("longest", 0)
        return [None] * len(prompts)

    scores = make(func, other, reward_workers=2)(rolled(["one", "two", "six"], ["a", "bc", "def"]))
    assert scores.extra == dict(length=[1, 2, 3], upper=["ONE", "TWO", "SIX"])
    assert scores.metrics == dict(longest=(1 + 3 + 0 + 0) / 4)

    def wrong(prompts, log_extra, **kw):
        log_extra("x", [1])
        return [1.] * len(prompts)
    fails("Reward wrong: log_extra('x') got 1 values for 2 completions", wrong)


# How it is called

def test_names():
    class Kind:
        def __call__(self, prompts, **kw): return [1.] * len(prompts)
    def f(prompts, **kw): return [1.] * len(prompts)
    assert make(f, Kind(), f).names == ["f_0", "Kind", "f_2"]
    one = Rewards(f, None, PPOConfig("out", report_to="none"))
    assert one.names == ["f"] and one.weights.tolist() == [1.]
    with pytest.raises(ValueError, match="reward_weights has 2 entries for 1 rewards"): make(f, reward_weights=[1., 2.])
    with pytest.raises(ValueError, match="reward_funcs is empty"): make()
    with pytest.raises(TypeError, match="A reward is a model, its name, or a function, not 3"): make(3)


def test_coroutine_functions_run_together_after_the_others():
    order = []

    def waiting(name):
        async def func(prompts, **kw):
            order.append(name)
            await asyncio.sleep(.4)
            return [1.] * len(prompts)
        return named(name, func)

    class Kind:
        async def __call__(self, prompts, **kw): return await waiting("third")(prompts)
    def last(prompts, **kw):
        order.append("plain")
        return [1.] * len(prompts)

    scores = make(waiting("first"), waiting("second"), Kind(), last)
    start = time.monotonic()
    assert scores(rolled(["one"], ["a"])).total.tolist() == [4.]
    assert time.monotonic() - start < .75
    assert order[0] == "plain" and {*order[1:]} == {"first", "second", "third"}


def test_the_event_loop_lasts_and_ends_with_the_object():
    kept = {}

    async def func(prompts, **kw):
        semaphore = kept.setdefault("semaphore", asyncio.Semaphore(1))
        kept.setdefault("loops", []).append(asyncio.get_running_loop())
        async with semaphore: await asyncio.sleep(.01)
        return [1.] * len(prompts)

    def threads(): return Counter(t.name for t in threading.enumerate())["rewards"]

    before = threads()
    scores = make(func, reward_workers=2)
    assert threads() == before, "no loop where none is needed yet"
    for _ in range(2): scores(rolled(["one", "two"], ["a", "b"]))
    assert len({id(loop) for loop in kept["loops"]}) == 1 and len(kept["loops"]) == 4
    assert threads() == before + 1
    del scores
    gc.collect()
    assert threads() == before


def test_workers_and_timeouts():
    calls = []

    def asks(prompts, completions, **kw):
        calls.append(len(prompts))
        time.sleep(.2 * len(prompts))
        return [float(len(c)) for c in completions]

    four = rolled(["one", "two", "three", "four"], ["a", "bb", "ccc", "dddd"])
    start = time.monotonic()
    assert make(asks, reward_workers=4)(four).total.tolist() == [1., 2., 3., 4.]
    assert time.monotonic() - start < .6 and calls == [1, 1, 1, 1]

    def hangs(**kw): threading.Event().wait()
    async def sleeps(**kw): await asyncio.sleep(60)
    for func in (hangs, sleeps):
        start = time.monotonic()
        fails(
            f"Reward {func.__name__} took more than 0.05 s for 2 prompts, the first of them 'one'",
            func,
            reward_timeout=0.05,
        )
        assert time.monotonic() - start < 5


@pytest.mark.parametrize("settings", [{}, dict(reward_workers=2), dict(reward_timeout=9.)])
def test_a_function_that_fails_is_named_with_its_prompt(settings):
    def broken(prompts, **kw): return [1 / (p == "one") for p in prompts]
    async def trips(prompts, **kw): return [{"one": 1.}[p] for p in prompts]
    def leaves(prompts, **kw): raise SystemExit("bye")
    async def leaves_later(prompts, **kw): raise SystemExit("bye")
    def socket(prompts, **kw): raise TimeoutError("socket")
    def picky(prompts, **kw): return [1.] if len(prompts) == 1 else 1 / 0
    def ids(prompts, completion_ids, **kw): return [1 / (len(i) - 2) for i in completion_ids]
    fails("Reward broken failed on the prompt 'two': ZeroDivisionError", broken, **settings)
    fails("Reward trips failed on the prompt 'two': KeyError", trips, **settings)
    if settings: fails("Reward leaves failed on the prompt 'one': SystemExit: bye", leaves, **settings)
    fails("Reward leaves_later failed on the prompt 'one': SystemExit: bye", leaves_later, **settings)
    fails("Reward socket failed on the prompt 'one': TimeoutError: socket", socket, **settings)
    fails("Reward ids failed on the prompt 'two': ZeroDivisionError", ids, **settings)
    if not settings: fails("Reward picky failed on 2 prompts, the first of them 'one': ZeroDivisionError", picky)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_no_error_of_the_function(stop):
    calls = []

    def func(**kw):
        calls.append(1)
        raise stop
    with pytest.raises(stop): make(func)(rolled(["one", "two"], ["a", "b"]))
    assert len(calls) == 1


# On some of the processes; two real ones are in test_ranks.py

def test_parts():
    assert in_parts([1, 2, 3], 2) == [[1], [2, 3]] and in_parts([1], 4) == [[1]]


class Process:
    "One of three processes; `others` writes down what the others send in each exchange."
    def __init__(self, monkeypatch, rank, *others):
        self.rank, self.others = rank, iter(others)
        state = SimpleNamespace(process_index=rank, num_processes=3)
        monkeypatch.setattr(rewards, "PartialState", lambda: state)
        monkeypatch.setattr(rewards, "gather_object", self.gather)

    def gather(self, own):
        sent = next(self.others)
        return sent[:self.rank] + own + sent[self.rank:]


def samples(*names): return [Sample(dict(prompt=n, level=len(n)), n, n * 2, [0] * len(n) * 2) for n in names]


def judged(*scores): return [rewards.Judged(list(s), {}) for s in scores]


def level(prompts, completions, level, log_extra, log_metric, **kw):
    log_extra("of", [p.upper() for p in prompts])
    log_metric("asked", len(prompts))
    return [[float(n)] * 2 * n if n > 1 else None if p == "d" else 9. for p, n in zip(prompts, level)]


def test_a_process_that_holds_rewards_scores_for_others(monkeypatch):
    asked = []

    def seen(prompts, **kw):
        asked.extend(prompts)
        return [0.] * len(prompts)

    Process(
        monkeypatch,
        1,
        [samples("a"), samples("ddd", "e")],
        [(judged((9.0, 0.0), ([2.0] * 4, 0.0)), [dict(asked=2)], None), ([], [], None)],
    )
    scores = make(level, seen, reward_processes=2)(rolled(["bb", "c"], ["bbbb", "cc"], level=[2, 1]))
    assert asked == ["c", "ddd", "e"]
    assert scores.total.tolist() == [8., 9.] and scores.per_token.tolist() == [[2.] * 4, [0.] * 4]
    assert scores.extra == dict(of=[None, "C"]) and scores.metrics == dict(asked=2.5)


def test_a_process_without_rewards_loads_and_calls_nothing(monkeypatch):
    Process(monkeypatch, 2, [samples("a"), samples("b")], [(judged((1.,)), [], None), (judged((2.,), (3.,)), [], None)])
    assert [holds_rewards(n) for n in (None, 3, 2)] == [True, True, False]
    scores = make("a/reward-model", reward_processes=2)
    assert scores.names == ["reward-model"] and scores.funcs == ["a/reward-model"]
    assert scores(rolled(["c"], ["cc"])).total.tolist() == [3.]


def test_an_error_of_one_process_is_raised_in_all(monkeypatch):
    wrong = ValueError("Reward x failed on the prompt 'a'")
    Process(monkeypatch, 2, [samples("a"), samples("b")], [([], [], wrong), (judged((2.,), (3.,)), [], None)])
    with pytest.raises(ValueError, match="failed on the prompt 'a'"):
        make("a/reward-model", reward_processes=2)(rolled(["c"], ["cc"]))

    def trips(prompts, **kw): return [{"c": 1.}[p] for p in prompts]
    Process(monkeypatch, 0, [samples("d"), []], [([], [], None), ([], [], None)])
    with pytest.raises(ValueError, match="Reward trips failed on the prompt 'd': KeyError"):
        make(trips, reward_processes=1)(rolled(["c"], ["cc"]))


def test_a_quantized_model_is_moved_and_keeps_its_type():
    tok = policy_tokenizer()
    model = llama(tok)
    model.quantization_method, model.is_quantized = "gptq", True
    reward, = make(model, tokenizers=[tok]).funcs
    assert reward.model is model
    with pytest.raises(ValueError, match="reward_dtype=float32 does not go with a quantized reward model"):
        make(model, tokenizers=[tok], reward_dtype="float32")


def test_float32_that_does_not_fit_is_said(monkeypatch):
    tok = policy_tokenizer()
    reward = RewardModel(overflows(tok).to(torch.float16), tok)

    def half_way():
        reward.model.model.norm.float()
        raise torch.OutOfMemoryError("CUDA out of memory.")
    monkeypatch.setattr(reward.model, "float", half_way)
    with pytest.raises(RunError, match="does not fit in float32"): reward(QUESTIONS, ANSWERS)
    assert {p.dtype for p in reward.model.parameters()} == {torch.float16}
