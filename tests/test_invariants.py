"What must always be true, against hand-made sums, brute force, autograd or torch.distributions. 13 is test_ranks.py."
import math
from functools import cache, partial

import pytest
import torch
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_oracle import WORDS, look, make, without_adapter

from rlhf_nb.config import PPOConfig
from rlhf_nb.data import PromptOrder
from rlhf_nb.learner import Experience, ppo_loss
from rlhf_nb.models import ActorCritic, Sampling, Tokens, lora_targets
from rlhf_nb.ppo import approx_kl, gae, kl_penalty, masked_mean, policy_loss, token_rewards, value_loss, whiten
from rlhf_nb.rewards import Scores
from rlhf_nb.rollout import Generation, Rollout, generate, pad_rows
from rlhf_nb.testing import DECODERS, tiny_policy
from rlhf_nb.trainer import rollout_stats

settings.register_profile(
    "here", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
settings.load_profile("here")
few = settings(max_examples=12)
SEED, LENGTHS, KINDS = (
    st.integers(0, 2**20),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.sampled_from(["k1", "abs", "k2", "k3"]),
)
ARCH, TEMPERATURE = st.sampled_from(sorted(DECODERS)), st.floats(.3, 3)


def ragged(lengths, seed, n=1, dtype=torch.float64):
    "n tensors of random numbers with NaN outside the mask, and the mask."
    torch.manual_seed(seed)
    mask = torch.arange(max(lengths) + seed % 3) < torch.tensor(lengths)[:, None]
    return *(torch.randn(mask.shape, dtype=dtype).masked_fill(~mask, math.nan) for _ in range(n)), mask.long()


def rows_of(x, mask):
    "What counts, as lists."
    return [row[m > 0].tolist() for row, m in zip(x, mask)]


@cache
def policy_of(arch, lora=True, moved=True, dtype=torch.float32):
    "A policy whose weights have left their start."
    model, tok = tiny_policy(arch, initializer_range=.2)
    model = model.to(dtype)
    torch.manual_seed(5)
    if lora:
        model = get_peft_model(
            model, LoraConfig(r=4, lora_dropout=0.3, target_modules=lora_targets(model), task_type="CAUSAL_LM")
        )
    policy = ActorCritic(model)
    for p in policy.parameters():
        if moved and p.requires_grad: p.data += .03 * torch.randn_like(p)
    return policy, tok


def reference_of(policy): return without_adapter(policy.lm) if policy.ref_lm is None else policy.ref_lm


def batch_of(lengths, seed, vocab):
    "Prompts and completions of these lengths, padded."
    torch.manual_seed(seed)
    ids = lambda n: torch.randint(3, vocab, (n,))
    queries, completions = [ids(n) for n in lengths], [ids(n) for n in reversed(lengths)]
    ones = lambda rows: [torch.ones_like(x) for x in rows]
    return Tokens(
        pad_rows(queries, "left"),
        pad_rows(ones(queries), "left"),
        pad_rows(completions, "right"),
        pad_rows(ones(completions), "right"),
    )


def alone(policy, tokens, i, sampling):
    "Log-probs and values of one row without any padding."
    q, r = (
        tokens.query_ids[i][tokens.query_mask[i] > 0][None],
        tokens.response_ids[i][tokens.response_mask[i] > 0][None],
    )
    out = policy(Tokens(q, torch.ones_like(q), r, torch.ones_like(r)), sampling)
    return out.logprobs[0], out.values[0]


@few
@given(ARCH, st.booleans(), LENGTHS, SEED)
@torch.no_grad()
def test_01_padding_changes_nothing(arch, lora, lengths, seed):
    policy, tok = policy_of(arch, lora)
    batch, sampling = batch_of(lengths, seed, len(tok)), Sampling(.7)
    out = policy(batch, sampling)
    for i, m in enumerate(batch.response_mask > 0):
        for got, want in zip((out.logprobs[i][m], out.values[i][m]), alone(policy, batch, i, sampling)):
            torch.testing.assert_close(got, want, rtol=0, atol=3e-5)


@few
@given(ARCH, LENGTHS, SEED)
@torch.no_grad()
def test_01_in_bfloat16_padding_costs_no_more_than_the_type_does(arch, lengths, seed):
    (policy, tok), exact = policy_of(arch, dtype=torch.bfloat16), policy_of(arch)[0]
    batch, sampling = batch_of(lengths, seed, len(tok)), Sampling()
    out, real = policy(batch, sampling), batch.response_mask > 0
    assert out.logprobs.dtype == out.values.dtype == torch.float32
    off = max((out.logprobs[i][m] - alone(policy, batch, i, sampling)[0]).abs().max() for i, m in enumerate(real))
    assert off <= 2 * (out.logprobs - exact(batch, sampling).logprobs)[real].abs().max()


@few
@given(arch=ARCH, lora=st.booleans(), temperature=TEMPERATURE, size=st.integers(1, 5), seed=SEED)
def test_02_the_first_ratio_is_one(tmp_path, arch, lora, temperature, size, seed):
    trainer = make(
        arch,
        tmp_path,
        lora,
        temperature=temperature,
        per_device_train_batch_size=size,
        steps_per_generation=math.ceil(5 / size),
        gradient_accumulation_steps=1,
        seed=seed,
    )
    first, accumulate = [], trainer.learner.accumulate
    trainer.learner.accumulate = lambda *args: first.append(accumulate(*args)) or first[-1]
    out = trainer.rollout(list(WORDS))
    trainer.step(out, [1., -2., .5, 3., 0.])
    assert (
        abs(first[0]["val/ratio"] - 1) < 1e-5
        and first[0]["val/ratio_var"] < 1e-9
        and first[0]["policy/approxkl_avg"] < 1e-9
    )
    assert (
        first[0]["policy/clipfrac_avg"] == first[0]["val/clipfrac_avg"] == 0 and abs(first[-1]["val/ratio"] - 1) > 1e-6
    )


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("arch", DECODERS)
def test_03_at_the_start_policy_and_reference_agree(arch, lora):
    policy, tok = policy_of(arch, lora, moved=False)
    batch = batch_of([3, 1, 5], 0, len(tok))
    before = policy(batch, Sampling()).logprobs
    with policy.as_reference(): assert torch.equal(policy(batch, Sampling()).logprobs, before)


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("arch", DECODERS)
def test_03_an_error_does_not_leave_the_reference_on(arch, lora):
    policy, tok = policy_of(arch, lora)
    batch = batch_of([3, 1, 5], 0, len(tok))
    before, trained = policy(batch, Sampling()).logprobs, [n for n, p in policy.named_parameters() if p.requires_grad]
    with pytest.raises(KeyError), policy.as_reference():
        assert (policy(batch, Sampling()).logprobs - before).abs().max() > 1e-3
        raise KeyError
    assert torch.equal(policy(batch, Sampling()).logprobs, before)
    assert [n for n, p in policy.named_parameters() if p.requires_grad] == trained


@few
@given(arch=ARCH, lora=st.booleans(), temperature=TEMPERATURE)
@torch.no_grad()
def test_04_one_temperature_for_policy_and_reference(tmp_path, arch, lora, temperature):
    trainer = make(arch, tmp_path, lora, temperature=temperature)
    out, policy = trainer.rollout(list(WORDS)), trainer.policy
    tokens, sampling = out.tokens, trainer.sampler.sampling
    for i, m in enumerate(tokens.response_mask > 0):
        query, answer = tokens.query_ids[i][tokens.query_mask[i] > 0], tokens.response_ids[i][m]
        assert sampling.temperature == temperature
        for lm, got in ((policy.lm, out.logprobs), (reference_of(policy), out.ref_logprobs)):
            torch.testing.assert_close(
                got[i][m], look(policy, lm, query, answer, sampling)[0], rtol=0, atol=3e-5 / min(1, temperature)
            )


@few
@given(SEED, st.booleans(), st.integers(1, 6))
def test_05_eos_is_the_last_token_that_counts(seed, pad_is_eos, shortest):
    policy, tok = policy_of("llama")
    ends, pad = (2, *range(5, 1000, 4)), 2 if pad_is_eos else 0
    query = batch_of([2, 5, 3], seed, len(tok))[:2]
    uniforms = torch.rand(3, 9, generator=torch.Generator().manual_seed(seed))
    made = generate(policy, *query, Generation(Sampling(1., shortest, ends), 9, pad), uniforms)
    for row, m, done in zip(made.ids.tolist(), made.mask, made.ended.tolist()):
        n = int(m.sum())
        first = next((t for t, token in enumerate(row[:n]) if token in ends), None)
        assert m.tolist() == [1] * n + [0] * (len(row) - n) and set(row[n:]) <= {pad}
        assert (first == n - 1 >= shortest) if done else (first is None and n == 9)


@few
@given(SEED, LENGTHS)
def test_05_eos_is_trained_and_nothing_behind_it(seed, lengths):
    policy, tok = policy_of("llama")
    batch = batch_of(lengths, seed, len(tok))
    out, rm = policy(batch, Sampling()), batch.response_mask
    old = out.logprobs.detach().masked_fill(rm == 0, math.nan)
    grad, = torch.autograd.grad(policy_loss(out.logprobs, old, torch.randn_like(old) + 3, rm, .2)[0], out.logprobs)
    assert torch.equal(grad != 0, rm > 0)


@given(LENGTHS, SEED, KINDS, st.floats(0, 2))
def test_06_the_score_enters_once(lengths, seed, kind, coef):
    logprobs, ref, mask = ragged(lengths, seed, 2)
    scores, kl = torch.randn(len(lengths), dtype=torch.float64), kl_penalty(logprobs, ref, kind)
    rewards = token_rewards(scores, kl, mask, coef)
    paid = [[coef * k for k in row] for row in rows_of(kl, mask)]
    for got, want, score in zip(rewards, paid, scores.tolist()):
        assert math.isclose(got.sum().item(), score - sum(want), abs_tol=1e-9)
        assert all(math.isclose(a, -b, abs_tol=1e-12) for a, b in zip(got.tolist(), want[:-1]))


@given(LENGTHS, SEED, st.floats(0, 1), st.floats(0, 1), st.integers(0, 3))
def test_07_gae_is_the_sum_over_later_errors(lengths, seed, gamma, lam, wider):
    rewards, values, mask = ragged(lengths, seed, 2)
    pad = lambda x, fill: torch.cat([x, torch.full((len(x), wider), fill, dtype=x.dtype)], 1)
    advantages, returns = gae(pad(rewards, math.inf), pad(values, math.nan), pad(mask, 0), gamma, lam)
    for r, v, a, ret, m in zip(rows_of(rewards, mask), rows_of(values, mask), advantages, returns, mask):
        n, v = len(r), [*v, 0.]
        errors = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        want = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]
        assert all(math.isclose(x, y, abs_tol=1e-9) for x, y in zip(a.tolist(), want))
        assert all(math.isclose(x, y + z, abs_tol=1e-9) for x, y, z in zip(ret.tolist(), want, v))
        assert not a[n:].any() and not ret[n:].any()


@given(LENGTHS, SEED)
def test_07_undiscounted_returns_are_the_reward_to_go(lengths, seed):
    rewards, values, mask = ragged(lengths, seed, 2)
    for r, ret in zip(rows_of(rewards, mask), gae(rewards, values, mask, 1., 1.)[1]):
        assert all(math.isclose(ret[t].item(), sum(r[t:]), abs_tol=1e-9) for t in range(len(r)))


@given(LENGTHS, SEED, st.booleans(), st.floats(-50, 50), st.floats(.1, 50))
def test_08_whitening(lengths, seed, shift, mean, scale):
    x, mask = ragged(lengths, seed)
    x = mean + scale * x
    white, plain = whiten(x, mask, shift), sum(rows_of(x, mask), [])
    got = sum(rows_of(white, mask), [])
    assert not white[mask == 0].any() and all(map(math.isfinite, got))
    assert math.isclose(math.fsum(got) / len(got), 0 if shift else math.fsum(plain) / len(plain), abs_tol=1e-6)
    if len(got) > 1:
        before, after = (torch.tensor(v, dtype=torch.float64).var().item() for v in (plain, got))
        assert math.isclose(after, before / (before + 1e-8), rel_tol=1e-6)


@few
@given(lengths=st.lists(st.integers(1, 9), min_size=2, max_size=6), size=st.integers(1, 6), seed=SEED, arch=ARCH,
       level=st.sampled_from(["token", "sequence"]))
def test_09_micro_batches_add_up(tmp_path, lengths, size, seed, arch, level):
    trainer = make(
        arch, tmp_path, True, gradient_accumulation_steps=1, per_device_train_batch_size=1, steps_per_generation=5,
        importance_sampling_level=level,
    )
    tokens, args, learner = batch_of(lengths, seed, len(trainer.processing_class)), trainer.args, trainer.learner
    more = ragged(lengths[::-1], seed - seed % 3, 5, torch.float32)
    with torch.no_grad(): now = trainer.policy(tokens, trainer.sampler.sampling).logprobs
    exp = Experience(
        tokens,
        tokens.response_mask,
        now + 0.1 * more[0],
        torch.zeros_like(now),
        *more[1:5],
        weights=torch.ones_like(now),
    )
    loss = partial(ppo_loss, trainer.policy, args=args, sampling=trainer.sampler.sampling)
    grads = []
    for learner.limit in (len(lengths), size):
        vars(args)["per_device_train_batch_size"] = len(lengths)
        trainer.optimizer.zero_grad()
        learner.accumulate(exp, torch.arange(len(lengths)), loss, None)
        grads.append(torch.cat([p.grad.flatten() for p in trainer.strategy.trained]))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)
    assert grads[0].abs().max() > 1e-4


def test_09_a_pass_of_few_tokens_gives_the_gradient_of_the_batch(tmp_path, monkeypatch):
    trainer = make("llama", tmp_path, True, per_device_train_batch_size=4, steps_per_generation=1,
                   gradient_accumulation_steps=1)
    tokens, args, learner = batch_of([9, 1, 4, 6], 0, len(trainer.processing_class)), trainer.args, trainer.learner
    more = ragged([6, 4, 1, 9], 0, 5, torch.float32)
    with torch.no_grad(): now = trainer.policy(tokens, trainer.sampler.sampling).logprobs
    exp = Experience(tokens, tokens.response_mask, now + .1 * more[0], now, *more[1:5], weights=torch.ones_like(now))
    loss = partial(ppo_loss, trainer.policy, args=args, sampling=trainer.sampler.sampling)
    found, events = [], []
    learner.on_event = events.append
    for size, rows in ((2 ** 19, 4), (1, 1)):
        monkeypatch.setattr("rlhf_nb.learner.PASS", size)
        assert [len(part) for part in learner.parts(tokens, torch.arange(4), 4)] == [rows] * (4 // rows)
        trainer.optimizer.zero_grad()
        stats = learner.accumulate(exp, torch.arange(4), loss, None)
        found.append((torch.cat([p.grad.flatten() for p in trainer.strategy.trained]), stats))
    (one, stats), (other, of_many) = found
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    assert stats == pytest.approx(of_many, rel=1e-4) and stats["val/ratio_var"] > 1e-4 and events == []
    vars(args)["per_device_train_batch_size"] = 2
    learner.accumulate(exp, torch.arange(4), loss, None)
    assert events == ["substep_end"], "a micro-batch is what the setting says"


def test_09_a_completion_that_has_run_away_has_a_finite_gradient():
    "Its ratio would overflow: 1,000 tokens, each a little more likely than before."
    grown, old, mask = torch.full((2, 1000), .2, requires_grad=True), torch.zeros(2, 1000), torch.ones(2, 1000)
    loss, clipped = policy_loss(grown, old, mask * torch.tensor([[1.], [-1.]]), mask, .2, level="sequence")
    grad, = torch.autograd.grad(loss, grown)
    assert loss.isfinite() and grad.isfinite().all() and (grad[0] == 0).all() and (grad[1] > 0).all()
    assert clipped == .5


@few
@given(limit=st.floats(1e-4, 1e-2), size=st.integers(1, 5), seed=SEED)
def test_09_every_update_is_clipped(tmp_path, limit, size, seed):
    trainer = make(
        "gpt2",
        tmp_path,
        True,
        max_grad_norm=limit,
        per_device_train_batch_size=size,
        steps_per_generation=math.ceil(5 / size),
        gradient_accumulation_steps=1,
        num_iterations=3,
        seed=seed,
    )
    norms, step = [], trainer.optimizer.step
    norm = lambda: math.sqrt(sum(p.grad.pow(2).sum().item() for p in trainer.strategy.trained))
    trainer.optimizer.step = lambda: (norms.append(norm()), step())
    trainer.step(trainer.rollout(list(WORDS)), [1., -2., .5, 3., 0.])
    assert len(norms) == 3 * math.ceil(5 / size) and all(.99 * limit < n < 1.001 * limit for n in norms)


@given(st.integers(1, 40), st.integers(1, 50), SEED)
def test_10_every_prompt_once_an_epoch(n, size, seed):
    steps, order = math.ceil(3 * n / size), PromptOrder(Dataset.from_dict(dict(prompt=list(map(str, range(n))))), seed)
    seen = [int(row["prompt"]) for _ in range(steps) for row in order.take(size)]
    epochs = [seen[i:i + n] for i in (0, n, 2 * n)]
    assert all(sorted(e) == list(range(n)) for e in epochs) and (n < 8 or epochs[0] != epochs[1] != epochs[2])


@few
@given(size=st.integers(1, 5), epochs=st.integers(1, 4), seed=SEED)
def test_10_every_answer_once_an_epoch(tmp_path, size, epochs, seed):
    trainer = make(
        "gpt2",
        tmp_path,
        True,
        per_device_train_batch_size=size,
        steps_per_generation=math.ceil(5 / size),
        gradient_accumulation_steps=1,
        num_iterations=epochs,
        seed=seed,
    )
    rows, accumulate = [], trainer.learner.accumulate
    trainer.learner.accumulate = lambda exp, some, *more: (rows.extend(some.tolist()), accumulate(exp, some, *more))[1]
    trainer.step(trainer.rollout(list(WORDS)), [1., -2., .5, 3., 0.])
    assert [sorted(rows[i:i + 5]) for i in range(0, len(rows), 5)] == [list(range(5))] * epochs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_11_log_probs_and_kl_are_float32(dtype):
    policy, tok = policy_of("llama", dtype=dtype)
    batch = batch_of([3, 5], 0, len(tok))
    with torch.no_grad(): out = policy(batch, Sampling(), entropy=True)
    with torch.no_grad(), policy.as_reference(): ref = policy(batch, Sampling()).logprobs
    assert {x.dtype for x in (out.logprobs, out.values, out.entropy, ref, kl_penalty(out.logprobs, ref))} == {
        torch.float32
    }
    torch.testing.assert_close(
        out.logprobs,
        policy_of("llama")[0](batch, Sampling()).logprobs,
        rtol=0,
        atol=0.2 if dtype == torch.bfloat16 else 0.02,
    )


@given(LENGTHS, SEED, st.sampled_from([math.nan, math.inf, -math.inf, 1e38]), st.sampled_from(["token", "sequence"]))
def test_11_nothing_outside_the_mask_reaches_a_loss(lengths, seed, poison, level):
    new, old, adv, ret, mask = ragged(lengths, seed, 4)
    results = []
    for fill in (0., poison):
        x, *rest = (t.nan_to_num(0.).masked_fill(mask == 0, fill) for t in (new, old, adv, ret))
        x.requires_grad_()
        loss = policy_loss(x, rest[0], rest[1], mask, .2, .3, 3., level=level)[0]
        loss = loss + value_loss(x, rest[0], rest[2], mask, .2)[0]
        loss = (
            loss
            + masked_mean(kl_penalty(torch.where(mask > 0, x, 0.0), torch.where(mask > 0, rest[0], 0.0), "k3"), mask)
            + approx_kl(x, rest[0], mask)
        )
        results.append((loss, *torch.autograd.grad(loss, x)))
    assert all(torch.equal(a, b) and a.isfinite().all() for a, b in zip(*results))


def test_12_trained_tokens_are_the_drawn_ones(tmp_path):
    trainer = make("bloom", tmp_path, True)
    out, tok = trainer.rollout(list(WORDS)), trainer.processing_class
    seen, forward = [], trainer.policy.forward
    trainer.policy.forward = lambda tokens, *args, **kw: (seen.append(tokens[2:]), forward(tokens, *args, **kw))[1]
    trainer.step(out, [0.] * 5)
    drawn = sorted(row[m > 0].tolist() for row, m in zip(*out.tokens[2:]))
    per_epoch = [row[m > 0].tolist() for ids, mask in seen for row, m in zip(ids, mask)]
    assert [sorted(per_epoch[i:i + 5]) for i in (0, 5)] == [drawn] * 2
    again = [tok(tok.decode(ids), add_special_tokens=False).input_ids for ids in drawn]
    assert again != drawn, "decoding and encoding would not have been noticed"


@given(LENGTHS, SEED, KINDS, st.floats(0, 2))
def test_14_what_is_logged_is_what_is_true(lengths, seed, kind, coef):
    logprobs, ref, entropy, drawn, mask = ragged(lengths, seed, 4)
    torch.manual_seed(seed)
    scores, ended = torch.randn(len(lengths)), torch.rand(len(lengths)) < .5
    ids = torch.randint(3, mask.shape)
    tokens = Tokens(ids, mask, ids, mask)
    out = Rollout(
        [],
        [],
        [],
        tokens,
        logprobs=logprobs,
        sampling_logprobs=drawn,
        ref_logprobs=ref,
        values=None,
        entropy=entropy,
        ended=ended,
    )
    args = PPOConfig("out", kl_estimator=kind, report_to="none")
    one = torch.full_like(scores, math.nan).index_fill(0, torch.tensor([0]), 2.)
    got = rollout_stats(out, Scores(scores, {"a": scores, "b": one}), args, kl_coef=coef)
    mean, pairs = lambda xs: sum(xs) / len(xs), [pair for row in rows_of(ids, mask) for pair in zip(row, row[1:])]
    gaps = [[a - b for a, b in zip(*rows)] for rows in zip(rows_of(logprobs, mask), rows_of(ref, mask))]
    moved = [abs(a - b) for rows in zip(rows_of(logprobs, mask), rows_of(drawn, mask)) for a, b in zip(*rows)]
    cost = dict(k1=lambda d: d, abs=abs, k2=lambda d: d * d / 2, k3=lambda d: math.exp(-d) - 1 + d)[kind]
    stopped = [n for n, done in zip(lengths, ended.tolist()) if done] or [0]
    want = {
        "objective/kl": mean([sum(row) for row in gaps]),
        "kl": mean(sum(gaps, [])),
        "reward": mean(scores.tolist()),
        "objective/non_score_reward": -coef * mean([sum(map(cost, row)) for row in gaps]),
        "entropy": mean(sum(rows_of(entropy, mask), [])),
        "completions/clipped_ratio": 1 - mean([float(e) for e in ended.tolist()]),
        "completions/mean_length": mean(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": mean(stopped),
        "rewards/a/mean": mean(scores.tolist()),
        "rewards/b/mean": 2.0,
        "sampling/logp_difference_mean": mean(moved),
    }
    if pairs: want["completions/distinct_2"] = len({*pairs}) / len(pairs)
    assert all(math.isclose(got[k], v, rel_tol=1e-5, abs_tol=1e-6) for k, v in want.items()), {
        k: (got[k], v) for k, v in want.items()
    }
