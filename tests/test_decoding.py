"""Steps of fixed shapes give the tokens of the plain loop, for every architecture whose cache has fixed shapes."""
import pytest
import torch
from architectures import DECODERS, REFUSED, VOCAB
from test_architectures import SAMPLING, change, make
from transformers.generation import TopKLogitsWarper, TopPLogitsWarper

from rlhf_nb import decoding
from rlhf_nb.decoding import FixedBatch, FixedLayer, NotFixed, fits, generate_static
from rlhf_nb.kernels import packed_for_generation
from rlhf_nb.models import Sampling
from rlhf_nb.rollout import Generation, generate, padded
from rlhf_nb.testing import tiny_run

QUICK = "llama", "qwen3", "gemma3_text", "gemma4", "gpt2", "bloom", "qwen3_moe", "qwen3_next", "mamba2", "mpt"
each = pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DECODERS if name not in REFUSED
])
# Transformers does not say that they compute with fixed shapes, or layers of their cache are of kinds that grow
NOT_FIXED = set("""
    aria_text axk2 bert bert-generation big_bird ctrl dbrx deepseek_v32 doge dots3_note dots3_note_text electra ernie
    falcon_h1 falcon_mamba fuyu git glm_moe_dsa gpt_neo hy_v4 inkling2_text inkling_text jetmoe longcat_flash mamba
    megatron-bert minimax moshi moss_transcribe_diarize mpt openai-gpt qwen4_exp qwen4_exp_text rembert roc_bert
    roformer zamba zamba2 zaya
""".split())


def prompts(*lengths: int):
    source = torch.Generator().manual_seed(1)
    queries = [torch.randint(60, VOCAB, (n,), generator=source) for n in lengths]
    return padded(queries, 3), torch.rand(len(lengths), 40, generator=source)


@each
def test_the_same_tokens_as_the_plain_loop(name):
    policy = make(name, lora=True)
    change(policy)
    query, uniforms = prompts(3, 9, 6, 12, 5, 7, 8, 3, 4)
    generation = Generation(SAMPLING, 24, 3)
    plain = generate(policy, *query, generation, uniforms)
    if name in NOT_FIXED:
        with pytest.raises(NotFixed, match="does not compute with fixed shapes"):
            generate_static(policy, *query, generation, uniforms)
        return
    found = generate_static(policy, *query, generation, uniforms)
    for x, y in zip(plain, found):
        if x.is_floating_point(): assert (x - y).abs().max() < 1e-4
        else: assert torch.equal(x, y)


def settings(**more):
    "Generation with many EOS tokens, and what is changed."
    return Generation(SAMPLING, 24, 3)._replace(**more)


def ends_with_two_low_ids(ids):
    return (ids[:, -2:] < 200).all(1) & (ids.shape[1] > 1)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bloom"])
@pytest.mark.parametrize("more", [
    dict(sampling=SAMPLING._replace(temperature=.7, min_length=7)),
    dict(warpers=[TopKLogitsWarper(20), TopPLogitsWarper(.9)]),
    dict(stop=ends_with_two_low_ids, sampling=SAMPLING._replace(eos_token_ids=(2,))),
    dict(max_length=1), dict(max_length=2), dict(max_length=9), dict(max_length=40),
], ids=lambda more: "-".join(f"{k}={v}" if isinstance(v, int) else k for k, v in more.items()))
@pytest.mark.parametrize("greedy", [False, True])
def test_all_settings(name, more, greedy):
    policy = make(name, lora=True)
    change(policy)
    query, uniforms = prompts(3, 19, 6, 12, 5)
    given = policy, *query, settings(**more), None if greedy else uniforms
    found = generate_static(*given)
    for x, y in zip(generate(*given), found): torch.testing.assert_close(x, y, rtol=0, atol=1e-4)


def test_the_batch_shrinks_to_few_sizes(monkeypatch):
    policy = make("llama", lora=True)
    sizes = []
    whole = FixedBatch.step
    def step(batch):
        sizes.append(len(batch.token))
        whole(batch)
    monkeypatch.setattr(FixedBatch, "step", step)
    query, uniforms = prompts(*[5] * 40)
    made = generate_static(policy, *query, settings(max_length=40), uniforms)
    assert len(made.ids) == 40 and made.ended.sum() > 36
    assert sizes[0] == 40 and sizes == sorted(sizes, reverse=True) and {*sizes} <= {40, 20, 10, 5}
    assert len(sizes) < 39 or not made.ended.all()


def test_all_rows_end_with_the_first_token():
    policy = make("llama", lora=True)
    query, uniforms = prompts(5, 6)
    made = generate_static(policy, *query, settings(sampling=Sampling(1., 0, tuple(range(VOCAB)))), uniforms)
    assert made.ids.shape == (2, 1) and made.ended.all()


def trainer(arch="llama", **settings):
    return tiny_run(arch, cache_implementation="static", max_steps=1, **settings)


def same(a, b): return torch.equal(a.tokens.response_ids, b.tokens.response_ids)


@pytest.mark.parametrize("more", [dict(repetition_penalty=1.5), dict(generation_kwargs=dict(no_repeat_ngram_size=2))])
def test_what_needs_the_plain_loop_gets_it(more, monkeypatch):
    monkeypatch.setattr(decoding, "generate_static", None)
    found = trainer(**more).rollout(["A question", "Another"])
    assert same(found, tiny_run("llama", max_steps=1, **more).rollout(["A question", "Another"]))


def test_a_model_without_fixed_shapes_gets_the_plain_loop_and_says_so_once(caplog):
    ours = trainer("gpt2")
    ours.policy.lm.get_base_model()._can_compile_fullgraph = False
    for _ in range(2): found = ours.rollout(["A question", "Another"])
    said = [r.message for r in caplog.records if "without a CUDA graph" in r.message]
    assert len(said) == 1 and "a gpt2 does not compute with fixed shapes" in said[0] and not ours.sampler.fixed.usable
    theirs = tiny_run("gpt2", max_steps=1)
    for _ in range(2): plain = theirs.rollout(["A question", "Another"])
    assert same(found, plain)


def test_steps_that_compute_something_else_are_noticed(caplog, monkeypatch):
    ours, theirs = trainer(), tiny_run("llama", max_steps=1)
    monkeypatch.setattr(FixedLayer, "get_seq_length", lambda layer: layer.cumulative_length[0] - 5)
    monkeypatch.setattr(FixedLayer, "update", lambda layer, k, v, *_, **__: (layer.keys, layer.values))
    assert same(ours.rollout(["A question", "Another"]), theirs.rollout(["A question", "Another"]))
    assert "nats per token: the plain loop" in caplog.text and not ours.sampler.fixed.usable


def test_a_run_learns_the_same(tmp_path):
    one, other = (tiny_run("qwen3", cache_implementation=kind, max_steps=3) for kind in ("static", "dynamic"))
    for t in (one, other): t.train()
    assert one.history("reward") == other.history("reward") and one.sampler.fixed.usable


def test_an_explicit_static_that_is_not_possible_is_said(caplog):
    trainer(repetition_penalty=1.5)
    assert "cache_implementation=static has no effect with settings that read the tokens so far" in caplog.text
    caplog.clear()
    tiny_run("llama", repetition_penalty=1.5)
    assert not caplog.records
    with pytest.raises(ValueError, match="=static does not go with use_vllm"): trainer(use_vllm=True)


def test_a_model_on_two_devices_gets_the_plain_loop():
    policy = make("llama", lora=True)
    query, _ = prompts(3, 9)
    _, cache = policy.next_logits(*query, None)
    assert fits(policy, cache)
    policy.lm.get_base_model().lm_head.to("meta")
    assert not fits(policy, cache)


def test_other_devices_have_their_own_way(monkeypatch):
    policy = make("llama", lora=True)
    base = policy.lm.get_base_model()
    monkeypatch.setattr(type(base), "device", torch.device("mps")) # Neither a CPU nor a GPU of CUDA
    with packed_for_generation(base, 1): assert not any("forward" in vars(m) for m in base.modules())
