"The sampler: what it samples is what transformers would sample, and it depends on nothing else."
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close

from rlhf_nb.config import PPOConfig
from rlhf_nb.errors import RunError
from rlhf_nb.models import ActorCritic, Sampling, lora_targets
from rlhf_nb.rollout import (
    PROCESSORS,
    WARPERS,
    Generation,
    Sampler,
    generate,
    generation_settings,
    logits_processors,
    padded,
)
from rlhf_nb.testing import tiny_policy

ARCHS = ["llama", "qwen3", "gemma3", "gpt2", "bloom"]
TEXTS = ["What helps against a cough at night, and how soon will it help?", "Why?", "Fever, two days",
         "Hiccups or worse?"]
STRINGS = [dict(prompt=text) for text in TEXTS]
TEMPLATE = ("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
            "{% if thinking %}<think>{% endif %}<assistant>")
MESSAGES = [dict(prompt=[dict(role="user", content=text)]) for text in TEXTS]
ALONE = SimpleNamespace(autocast=nullcontext, gathered=nullcontext, in_step=False)
EOS = (2, *range(5, 1000, 31))

def kwargs(**settings): return dict(generation_kwargs=settings)


RESTRICTED = dict(
    top_k=dict(top_k=5), top_p=dict(top_p=.6), min_p=dict(min_p=.2), penalty=dict(repetition_penalty=2.),
    together=dict(top_k=20, top_p=.8, min_p=.05, repetition_penalty=1.4),
    typical=kwargs(typical_p=.6), eta=kwargs(eta_cutoff=.02, epsilon_cutoff=.002), top_h=kwargs(top_h=.6),
    ngrams=kwargs(no_repeat_ngram_size=1),
    words=kwargs(bad_words_ids=[[7], [300, 301]], suppress_tokens=[*range(400, 600)],
                 sequence_bias=[[[9], 4.], [[21, 22], -3.]]))


def policy_for(arch, lora=True, **config):
    model, tok = tiny_policy(arch, initializer_range=.2, **config)
    tok.chat_template = TEMPLATE
    torch.manual_seed(0)
    if lora: model = get_peft_model(model, LoraConfig(r=4, target_modules=lora_targets(model), task_type="CAUSAL_LM"))
    policy = ActorCritic(model)
    for p in policy.parameters():
        if p.requires_grad: p.data += .1 * torch.randn_like(p)
    return policy, tok


def sampler_for(policy, tok, eos=EOS, strategy=ALONE, **settings):
    common = dict(max_completion_length=20, temperature=.8, min_completion_length=2, seed=5)
    args = PPOConfig("out", use_cpu=True, bf16=False, report_to="none", **common | settings)
    sampler = Sampler(policy, tok, args, strategy)
    sampler.eos_token_ids = eos
    return sampler


def rows_of(out):
    "Prompt and completion of each row, without padding, and the slice of its completion."
    for i, (q, qm, r, rm) in enumerate(zip(*out.tokens)): yield i, q[qm > 0], r[rm > 0]


def expected(policy, settings, ids, position, min_length=2, temperature=.8):
    "Log-probs of the next token, as transformers' own `generate` would sample it."
    own = {k: v for k, v in settings.items() if k != "generation_kwargs"} | settings.get("generation_kwargs", {})
    more = dict(min_new_tokens=1) if position < min_length else {} # Which bars EOS
    out = policy.lm.generate(ids[None], do_sample=True, temperature=temperature, max_new_tokens=1, output_scores=True,
                             return_dict_in_generate=True, eos_token_id=list(EOS), pad_token_id=3,
                             **dict(top_k=0) | own | more)
    return out.scores[0][0].log_softmax(-1)


@pytest.mark.parametrize("rows", [STRINGS, MESSAGES], ids=["strings", "messages"])
@pytest.mark.parametrize("arch", ARCHS)
def test_sampling_log_probs_are_those_of_transformers_distribution(arch, rows):
    policy, tok = policy_for(arch)
    sampler = sampler_for(policy, tok, **RESTRICTED["together"])
    out = sampler(rows)
    assert sampler.off_policy
    for i, query, response in rows_of(out):
        for t, token in enumerate(response):
            want = expected(policy, RESTRICTED["together"], torch.cat([query, response[:t]]), t)
            assert_close(out.sampling_logprobs[i, t], want[token], rtol=0, atol=1e-3)
        scored = policy(out.tokens, sampler.sampling).logprobs.detach()
        assert_close(out.logprobs[i, :len(response)], scored[i, :len(response)], rtol=0, atol=1e-5)
    assert (out.sampling_logprobs - out.logprobs).abs().max() > .1


@pytest.mark.parametrize("name", RESTRICTED)
def test_every_setting_does_what_it_does_in_transformers(name):
    policy, tok = policy_for("llama", lora=False)
    sampler = sampler_for(policy, tok, eos=(2,), min_completion_length=0, **RESTRICTED[name])
    out = sampler(STRINGS)
    assert sampler.off_policy
    for i, query, response in rows_of(out):
        for t in (0, 1, len(response) - 1):
            want = expected(policy, RESTRICTED[name], torch.cat([query, response[:t]]), t, min_length=0)
            assert_close(out.sampling_logprobs[i, t], want[response[t]], rtol=0, atol=1e-3)
    off = (out.sampling_logprobs - out.logprobs)[out.tokens.response_mask > 0]
    assert off.abs().max() > .01 and off.isfinite().all()


@pytest.mark.slow
def test_frequencies_are_those_of_the_truncated_distribution():
    policy, tok = policy_for("llama")
    n, settings = 4000, dict(top_k=6, top_p=.9, repetition_penalty=1.5)
    sampler = sampler_for(policy, tok, max_completion_length=1, min_completion_length=0,
                          per_device_train_batch_size=n, **settings)
    out = sampler([STRINGS[0]] * n)
    query = next(rows_of(out))[1]
    p = expected(policy, settings, query, 0, min_length=0).exp()
    counts = out.tokens.response_ids[:, 0].bincount(minlength=len(p))
    real = p > 0
    assert 2 < real.sum() <= 6 and counts[~real].sum() == 0
    chi2 = ((counts[real] - n * p[real]) ** 2 / (n * p[real])).sum()
    assert chi2 < 20.5, "the 99.9 % point for 5 degrees of freedom"


@pytest.mark.parametrize("arch", ARCHS)
def test_greedy_completions_are_those_of_transformers(arch):
    policy, tok = policy_for(arch)
    words = kwargs(no_repeat_ngram_size=3, suppress_tokens=[9, 10, 11], bad_words_ids=[[7], [12, 13]])
    for settings in ({}, dict(repetition_penalty=1.7), words, dict(top_k=3, top_p=.5, min_p=.1)):
        sampler = sampler_for(policy, tok, max_completion_length=24, **settings)
        out = sampler(STRINGS, greedy=True)
        more = {k: v for k, v in settings.items() if k == "repetition_penalty"} | settings.get("generation_kwargs", {})
        for _, query, response in rows_of(out):
            want = policy.lm.generate(query[None], do_sample=False, max_new_tokens=24, min_new_tokens=2,
                                      eos_token_id=list(EOS), pad_token_id=3, **more)
            assert response.tolist() == want[0, len(query):].tolist()


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_completion_does_not_depend_on_its_neighbours(arch, pad_is_eos):
    policy, tok = policy_for(arch)
    if pad_is_eos: tok.pad_token = tok.eos_token
    for settings in (RESTRICTED["together"], RESTRICTED["ngrams"] | dict(repetition_penalty=1.3), RESTRICTED["words"]):
        sampled = [sampler_for(policy, tok, local_rollout_forward_batch_size=size, **settings)(STRINGS)
                   for size in (None, 1, 3)]
        for other in sampled[1:]:
            assert torch.equal(other.tokens.response_ids, sampled[0].tokens.response_ids)
            assert_close(other.sampling_logprobs, sampled[0].sampling_logprobs, rtol=0, atol=1e-3)


def test_two_processes_sample_like_one(monkeypatch):
    policy, tok = policy_for("bloom")
    for settings in ({}, RESTRICTED["together"]):
        one = sampler_for(policy, tok, **settings)(STRINGS).completions
        with monkeypatch.context() as patch:
            patch.setattr(PPOConfig, "world_size", 2)
            parts = []
            for process in range(2):
                patch.setattr(PPOConfig, "process_index", process)
                parts += sampler_for(policy, tok, **settings)(STRINGS[2 * process:2 * process + 2]).completions
        assert parts == one and len(set(one)) == 4


def test_settings_that_came_with_the_model_have_no_effect():
    policy, tok = policy_for("qwen3")
    before = sampler_for(policy, tok)(STRINGS)
    config = policy.lm.get_base_model().generation_config
    config.update(top_k=1, top_p=.1, temperature=.01, repetition_penalty=9., max_new_tokens=1, num_beams=3,
                  min_new_tokens=19, suppress_tokens=[*range(900)], no_repeat_ngram_size=2, eos_token_id=[2, 77])
    policy.lm.generation_config = config
    sampler = Sampler(policy, tok, sampler_for(policy, tok).args, ALONE)
    assert sampler.eos_token_ids == (2, 77), "the only one that counts"
    sampler.eos_token_ids = EOS
    assert not sampler.off_policy and torch.equal(sampler(STRINGS).tokens.response_ids, before.tokens.response_ids)


def test_settings_are_read_at_every_call():
    policy, tok = policy_for("llama")
    sampler = sampler_for(policy, tok, eos=())
    later = dict(max_completion_length=7, top_k=1, beta=0., stop_strings=["zz"], generation_kwargs=dict(min_p=.1))
    for name, value in later.items(): setattr(sampler.args, name, value)
    out = sampler(STRINGS)
    assert out.tokens.response_ids.shape[1] == 7 and sampler.off_policy and out.ref_logprobs.equal(out.logprobs)
    assert_close(out.sampling_logprobs, torch.zeros(4, 7), rtol=0, atol=1e-6)
    sampler.args.temperature = .3
    assert sampler.sampling.temperature == .3
    sampler.args.top_k, sampler.args.generation_kwargs = 0, None
    assert not sampler.off_policy


@pytest.mark.parametrize("given, text", [
    (dict(num_beams=4), "num_beams is not supported"),
    (dict(penalty_alpha=.6), "penalty_alpha is not supported"),
    (dict(prompt_lookup_num_tokens=3), "prompt_lookup_num_tokens is not supported"),
    (dict(assistant_model=1), "assistant_model is not supported"),
    (dict(nonsense=1), "nonsense is not supported"),
    (dict(num_return_sequences=2), "num_return_sequences is num_generations here"),
    (dict(max_new_tokens=5), "max_new_tokens is max_completion_length here"),
    (dict(min_new_tokens=5), "min_new_tokens is min_completion_length here"),
    (dict(temperature=.5), "temperature is temperature here"),
    (dict(stop_strings=["x"]), "stop_strings is stop_strings here"),
    (dict(do_sample=False), "do_sample is eval_do_sample here")])
def test_what_has_no_effect_is_refused(given, text):
    policy, tok = policy_for("llama")
    with pytest.raises(ValueError, match=f"^generation_kwargs: {text}[^\n]*$"):
        sampler_for(policy, tok, generation_kwargs=given)


def test_neutral_and_wrong_values():
    policy, tok = policy_for("llama")
    plain = sampler_for(policy, tok)
    neutral = kwargs(num_beams=1, do_sample=True, num_return_sequences=1, use_cache=True, top_k=0,
                     typical_p=1., max_length=None)
    sampler = sampler_for(policy, tok, top_p=1., min_p=0., repetition_penalty=1., **neutral)
    assert not sampler.off_policy
    assert torch.equal(sampler(STRINGS).tokens.response_ids, plain(STRINGS).tokens.response_ids)
    both = PPOConfig("out", top_k=3, use_cpu=True, **kwargs(top_k=7))
    assert generation_settings(both) == dict(top_k=7), "as in TRL"
    with pytest.raises(ValueError, match="^typical_p=3: `typical_p`"): sampler_for(policy, tok, **kwargs(typical_p=3))
    with pytest.raises(ValueError, match="^bad_words_ids='no'"): sampler_for(policy, tok, **kwargs(bad_words_ids="no"))
    found = logits_processors(dict(top_p=.5, top_k=3, repetition_penalty=2), PROCESSORS | WARPERS)
    names = [type(p).__name__ for p in found]
    assert names == ["RepetitionPenaltyLogitsProcessor", "TopKLogitsWarper", "TopPLogitsWarper"], "transformers' order"


@pytest.mark.parametrize("ends", [77, [77, 78]])
def test_eos_token_id_replaces_the_tokens_that_end(ends):
    policy, tok = policy_for("llama")
    args = PPOConfig("out", generation_kwargs=dict(eos_token_id=ends), use_cpu=True, bf16=False, report_to="none")
    sampler = Sampler(policy, tok, args, ALONE)
    assert sampler.sampling.eos_token_ids == ((77,) if ends == 77 else (77, 78)) and not sampler.off_policy


def test_the_minimum_length_holds_against_top_k():
    policy, tok = policy_for("llama")
    everything = tuple(range(0, 1000, 2))
    out = sampler_for(policy, tok, eos=everything, min_completion_length=6, top_k=1)(STRINGS)
    ids, mask = out.tokens.response_ids, out.tokens.response_mask
    assert (mask.sum(1) > 6).all() and (ids[:, :6] % 2 == 1).all()


def test_no_reference_pass_without_beta(monkeypatch):
    model, tok = tiny_policy("bloom", initializer_range=.2)
    policy = ActorCritic(model, reference=False)
    monkeypatch.setattr(policy, "as_reference", lambda: pytest.fail("asked for the reference"))
    out = sampler_for(policy, tok, beta=0)(STRINGS)
    assert torch.equal(out.ref_logprobs, out.logprobs) and not out.ref_logprobs.requires_grad
    monkeypatch.undo()
    with pytest.raises(ValueError, match="no reference"): sampler_for(policy, tok, beta=.1)(STRINGS)


def test_shortened_prompts_are_counted_and_said_once(caplog):
    policy, tok = policy_for("llama")
    sampler = sampler_for(policy, tok, max_prompt_length=5)
    for _ in range(2): out = sampler(STRINGS, greedy=True)
    full = sampler_for(policy, tok)(STRINGS, greedy=True)
    said = "3 of 4 prompts are longer than max_prompt_length=5 tokens: their beginning is cut"
    assert [r.message for r in caplog.records] == [said]
    assert sampler.shortened == 6 and out.tokens.query_ids.shape == (4, 5)
    for (_, cut, _), (_, whole, _) in zip(rows_of(out), rows_of(full)): assert cut.tolist() == whole[-5:].tolist()


def test_arguments_of_the_chat_template_are_passed_on():
    policy, tok = policy_for("llama")
    prompts = {}
    for given in (None, dict(thinking=True)):
        out = sampler_for(policy, tok, chat_template_kwargs=given)(MESSAGES)
        prompts[bool(given)] = [tok.decode(query) for _, query, _ in rows_of(out)]
        assert out.prompts == [row["prompt"] for row in MESSAGES]
    assert prompts[False] == [f"<user>{t}<assistant>" for t in TEXTS]
    assert prompts[True] == [f"<user>{t}<think><assistant>" for t in TEXTS]


def test_the_state_of_the_generator_continues_the_random_numbers():
    policy, tok = policy_for("bloom")
    sampler = sampler_for(policy, tok)
    sampler(STRINGS)
    state = sampler.generator.get_state()
    following = sampler(STRINGS)
    other = sampler_for(policy, tok, seed=99)
    other.generator.set_state(state)
    assert torch.equal(other(STRINGS).tokens.response_ids, following.tokens.response_ids)
    greedy, state = sampler(STRINGS, greedy=True), sampler.generator.get_state()
    sampler(STRINGS, torch.Generator().manual_seed(1))
    assert torch.equal(state, sampler.generator.get_state()), "only its own random numbers advance"
    assert greedy.completions != following.completions


def without_memory(policy, rows):
    "Make passes of more rows than this run out of memory."
    original = policy.next_logits

    def next_logits(ids, mask, cache):
        if len(ids) > rows: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return original(ids, mask, cache)
    policy.next_logits = next_logits


def test_out_of_memory_halves_the_rows_and_changes_nothing(caplog):
    policy, tok = policy_for("llama")
    plain = sampler_for(policy, tok, per_device_train_batch_size=4)
    want = [plain(STRINGS) for _ in range(2)]
    sampler = sampler_for(policy, tok, per_device_train_batch_size=4)
    without_memory(policy, 1)
    found = [sampler(STRINGS) for _ in range(2)]
    for a, b in zip(found, want):
        assert torch.equal(a.tokens.response_ids, b.tokens.response_ids)
        assert_close(a.logprobs, b.logprobs, rtol=0, atol=2e-5)
    said = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert sampler.limit == 1 and len(said) == 2
    for size, text in zip((2, 1), said): assert f"local_rollout_forward_batch_size={size} saves the attempt" in text
    without_memory(policy, 0)
    with pytest.raises(RunError, match="at a time. What helps: a shorter max_prompt_length or max_completion_length"):
        sampler(STRINGS)


def test_other_errors_are_raised_and_sharded_weights_are_not_halved():
    policy, tok = policy_for("llama")
    shards = SimpleNamespace(autocast=nullcontext, gathered=nullcontext, in_step=True)
    without_memory(policy, 1)
    sampler = sampler_for(policy, tok, strategy=shards, per_device_train_batch_size=4)
    with pytest.raises(RunError, match="weights are sharded"): sampler(STRINGS)

    def fails(*args): raise RuntimeError("something else")
    policy.next_logits = fails
    with pytest.raises(RuntimeError, match="^something else$"): sampler_for(policy, tok)(STRINGS)


def test_a_process_whose_rows_have_ended_computes_on_with_the_others():
    policy, tok = policy_for("bloom")
    query = padded([torch.tensor([7, 8]), torch.tensor([9])], 3)
    asked = []

    def anyone(here):
        asked.append(here)
        return len(asked) < 20
    found = generate(policy, *query, Generation(Sampling(eos_token_ids=tuple(range(1000))), 24, 3), None, anyone)
    assert found.ids.shape[1] == 1 and asked == [False] * 20
    asked.clear()
    generate(policy, *query, Generation(Sampling(), 24, 3), None, anyone)
    assert asked == [True] * 23


def test_stop_strings_end_and_are_cut():
    policy, tok = policy_for("llama")
    free = sampler_for(policy, tok, eos=())(STRINGS)
    stop = next(text[4:6] for text in free.completions if text[4:6].strip())
    out = sampler_for(policy, tok, eos=(), stop_strings=[stop])(STRINGS)
    assert out.completions == [text.split(stop)[0] for text in free.completions]
    assert out.ended.tolist() == [stop in text for text in free.completions] and out.ended.any()
