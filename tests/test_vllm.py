"Completions from a vLLM server, with a stand-in for the client: what is sent, and what comes of it."
import inspect
import json
import threading
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from accelerate.state import PartialState
from conftest import ROOT
from datasets import Dataset
from engine import Engine, uniforms_of
from peft import LoraConfig, get_peft_model
from test_shards import FSDP
from torch.testing import assert_close
from trl.generation import vllm_client

from rlhf_nb.config import PPOConfig
from rlhf_nb.learner import make_experience
from rlhf_nb.models import ActorCritic, Sampling, lora_targets
from rlhf_nb.ppo import importance_weights
from rlhf_nb.rollout import Sampler, generate_batches, stopper
from rlhf_nb.testing import DECODERS, tiny_policy
from rlhf_nb.trainer import PPOTrainer
from rlhf_nb.vllm import VLLMSampler, base_weights, checksums, end_of

TEXTS = ["Why?", "What helps against a cough at night, and how soon?", "Fever", "Hiccups", "Rest or walk?"]
PROMPTS = Dataset.from_dict(dict(prompt=TEXTS))
ROWS = [dict(prompt=text) for text in TEXTS]
NAMES = ["__init__", "generate", "update_named_params", "reset_prefix_cache", "get_server_info", "init_communicator"]
EOS = (2, *range(5, 1000, 7))
ALONE = SimpleNamespace(autocast=nullcontext, gathered=nullcontext, in_step=False)


WATCHED = dict(eval_strategy="steps", eval_steps=1, eval_on_start=True)
UNWATCHED = dict(eval_strategy="no", eval_on_start=False)


def count_e(prompts, completions, **columns): return [c.count("e") / 5 for c in completions]


def config_for(folder, engine, rows=4, **settings):
    common = dict(per_device_train_batch_size=rows, num_iterations=2, max_steps=3, max_completion_length=14,
                  min_completion_length=2, temperature=.8, learning_rate=1e-2, adam_epsilon=1e-3,
                  lr_scheduler_type="constant", save_strategy="no", logging_steps=1, report_to="none",
                  disable_tqdm=True, use_vllm=engine is not None, use_cpu=True, bf16=False,
                  log_completions=True, **WATCHED)
    return PPOConfig(str(folder), **common | settings)


def trainer_for(folder, engine=None, lora=True, rows=4, **settings):
    "A small run; with an engine, through the server's client."
    model, tok = tiny_policy("bloom", initializer_range=.2)
    torch.manual_seed(0)
    peft_config = LoraConfig(r=4, target_modules=lora_targets(model), task_type="CAUSAL_LM") if lora else None
    with pytest.MonkeyPatch.context() as patch:
        if engine: patch.setattr(vllm_client, "VLLMClient", engine)
        args = config_for(folder, engine, rows, **settings)
        trainer = PPOTrainer(model, count_e, args, PROMPTS, PROMPTS, tok, peft_config=peft_config)
    trainer.sampler.eos_token_ids = EOS
    return trainer


def policy_for(arch="bloom"):
    "A policy with an adapter that has been trained, as if."
    model, tok = tiny_policy(arch, initializer_range=.2)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=lora_targets(model), task_type="CAUSAL_LM")
    policy = ActorCritic(get_peft_model(model, lora))
    for p in policy.parameters():
        if p.requires_grad: p.data += .1 * torch.randn_like(p)
    return policy, tok


def samplers_for(engine, tmp_path, **settings):
    "One through the client and one without, of the same policy."
    policy, tok = policy_for()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_client, "VLLMClient", engine)
        PartialState()
        args = config_for(tmp_path, engine, **settings)
        client = VLLMSampler(policy.lm, args, torch.device("cpu"))
    through = Sampler(policy, tok, args, ALONE, client)
    without = Sampler(policy, tok, config_for(tmp_path, None, **settings | dict(generation_kwargs=None)), ALONE)
    for sampler in (through, without): sampler.eos_token_ids = EOS
    return through, without


class LikeTheEngine:
    "The policy itself, with the random numbers of a seed for each prompt."
    def __init__(self, policy): self.policy = policy

    def __call__(self, lm, queries, generation, uniforms, batch_size):
        if uniforms is not None:
            seeds = (uniforms[:, 0].double() * 2**24).long().tolist()
            uniforms = torch.cat([uniforms_of(seed, generation.max_length) for seed in seeds])
        return [*generate_batches(self.policy, queries, generation, uniforms, batch_size)]


@pytest.fixture
def engine(): return type("OwnEngine", (Engine,), {})


CLOCK = ("time", "tokens_per_second", "step_time", "train_runtime", "train_samples", "train_steps", "total_flos",
         "eval_runtime", "eval_samples", "eval_steps", "memory")
def timeless(history): return [{k: v for k, v in e.items() if not k.startswith(CLOCK)} for e in history]
def weights(trainer): return torch.cat([p.detach().flatten() for p in trainer.policy.parameters() if p.requires_grad])


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_has_the_signatures_of_trl(name):
    plain = lambda f: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
    assert plain(getattr(Engine, name)) == plain(getattr(vllm_client.VLLMClient, name))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_through_the_seam_is_the_run_without(engine, tmp_path, lora):
    through, without = trainer_for(tmp_path/"a", engine, lora), trainer_for(tmp_path/"b", lora=lora)
    without.sampler.client = LikeTheEngine(without.policy)
    for trainer in (through, without): trainer.train()
    logs = (timeless(trainer.state.log_history) for trainer in (through, without))
    for a, b in zip(*logs, strict=True): assert a == pytest.approx(b, rel=1e-3, abs=2e-5)
    assert_close(weights(through), weights(without), rtol=0, atol=1e-5)
    for kind in ("completions_00001", "completions_00003", "eval_00003"):
        a, b = (pd.read_parquet(tmp_path/run/"completions"/f"{kind}.parquet") for run in "ab")
        assert a.completion.tolist() == b.completion.tolist()
    assert engine.made.sent == ["weights", "reset"] * 4, "before the first update and after each of three"
    assert (weights(through) - weights(trainer_for(tmp_path/"c", lora=lora))).abs().max() > 1e-3


def test_weights_that_do_not_change_are_not_sent(engine, tmp_path):
    trainer = trainer_for(tmp_path, engine, critic="detached", critic_warmup_steps=2)
    trainer.train()
    assert engine.made.sent == ["weights", "reset"] * 2, "two updates of the critic alone"


def test_a_resumed_run_asks_with_the_same_seeds(engine, tmp_path):
    straight = trainer_for(tmp_path/"a", engine, **UNWATCHED)
    straight.train()
    asked = list(engine.made.asked)
    trainer_for(tmp_path/"b", engine, **UNWATCHED, save_strategy="steps", save_steps=2, max_steps=2).train()
    resumed = trainer_for(tmp_path/"b", engine, **UNWATCHED)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(engine.made.asked) == sorted(asked[8:]) and len({seed for _, seed in asked}) == 12
    assert torch.equal(weights(resumed), weights(straight))


def test_what_the_engine_rounds_is_weighed(engine, tmp_path):
    engine.as_served = lambda self, weight: weight.bfloat16().float()
    trainer = trainer_for(tmp_path, engine, importance_sampling_cap=1.01)
    assert trainer.sampler.off_policy
    out = trainer.rollout(ROWS)
    exp, _ = make_experience(out, trainer.score(out), trainer.args, .2, trainer.moments, trainer.sampler.off_policy)
    on = out.tokens.response_mask > 0
    assert torch.equal(exp.weights, importance_weights(out.logprobs, out.sampling_logprobs, 1.01))
    assert exp.weights[on].max() == torch.tensor(1.01) and exp.weights[on].min() < .99 and exp.weights[on].std() > 1e-3
    scored = trainer.policy(out.tokens, trainer.sampler.sampling).logprobs
    assert_close(out.logprobs[on], scored.detach()[on], rtol=0, atol=1e-5)
    assert trainer.step(out, trainer.score(out))["sampling/logp_difference_mean"] > 1e-3


def test_the_engine_that_stops_late_is_cut(engine, tmp_path):
    plain = trainer_for(tmp_path/"a", engine)
    free = plain.rollout(ROWS, torch.Generator().manual_seed(3))
    text = max(free.completions, key=len)
    stopping = trainer_for(tmp_path/"b", engine, stop_strings=[text[2:4]])
    cut = stopping.rollout(ROWS, torch.Generator().manual_seed(3))
    assert cut.completions == [c.split(text[2:4])[0] for c in free.completions] != free.completions
    assert all(done for done, c in zip(cut.ended, free.completions) if text[2:4] in c)


def test_a_server_that_fails_ends_the_run_with_its_words(engine, tmp_path):
    trainer = trainer_for(tmp_path, engine, **UNWATCHED, max_steps=9)
    generate = engine.generate
    def full(self, *args, **kwargs):
        if len(self.asked) >= 8: raise Exception("Request failed: 500, the engine is dead")
        return generate(self, *args, **kwargs)
    engine.generate = full
    text = "The vLLM server failed: Exception: Request failed: 500, the engine is dead"
    with pytest.raises(ConnectionError, match=text): trainer.train()
    assert (tmp_path/"checkpoint-2").exists()


def test_greedy_is_the_rollout_without_a_server(engine, tmp_path):
    for size in (None, 2):
        through, without = samplers_for(engine, tmp_path, local_rollout_forward_batch_size=size, stop_strings=["zz"])
        a, b = through(ROWS, greedy=True), without(ROWS, greedy=True)
        assert a.completions == b.completions and a.rows == b.rows == ROWS
        for x, y in zip(a.tokens, b.tokens, strict=True): assert torch.equal(x, y)
        for name in ("logprobs", "ref_logprobs", "values", "entropy", "ended"):
            assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=2e-5)
    told = engine.made.told[-1]
    want = dict(temperature=0., seed=None, max_tokens=14, min_tokens=2, stop=["zz"])
    assert {name: told[name] for name in want} == want


def test_sampled_tokens_are_as_likely_as_the_server_says(engine, tmp_path):
    sampler, _ = samplers_for(engine, tmp_path)
    out = sampler(ROWS, torch.Generator().manual_seed(0))
    assert_close(out.sampling_logprobs, out.logprobs, rtol=0, atol=1e-4)
    assert torch.equal(sampler(ROWS, torch.Generator().manual_seed(0)).tokens.response_ids, out.tokens.response_ids)
    told = engine.made.told[-1]
    want = dict(temperature=.8, min_tokens=2, stop_token_ids=[*EOS], stop=None, ignore_eos=True)
    assert {name: told[name] for name in want} == want
    twice = sampler(ROWS[:1] * 2)
    assert twice.completions[0] != twice.completions[1] and len({call["seed"] for call in engine.made.told[-2:]}) == 2


def test_the_server_gets_the_restrictions(engine, tmp_path):
    engine.settings = 1., .9, 5, 0.
    sampler, _ = samplers_for(engine, tmp_path, top_k=5, top_p=.9, generation_kwargs=dict(presence_penalty=.5))
    assert sampler.off_policy and not sampler.generation.warpers
    out = sampler(ROWS)
    off = (out.logprobs - out.sampling_logprobs)[out.tokens.response_mask > 0]
    assert off.max() < 1e-4 and off.min() < -.05, "weights of a truncated distribution are at most 1"
    assert engine.made.told[-1]["presence_penalty"] == .5


@pytest.mark.parametrize("name, setting", [
    ("n", "num_generations"), ("max_tokens", "max_completion_length"), ("min_tokens", "min_completion_length"),
    ("stop", "stop_strings"), ("temperature", "temperature"), ("seed", "seed"), ("logprobs", "the sampler")])
def test_what_a_setting_does_is_refused(engine, tmp_path, name, setting):
    with pytest.raises(ValueError, match=f"^generation_kwargs: {name} is set by {setting} here$"):
        samplers_for(engine, tmp_path, generation_kwargs={name: 3})


def test_weights_are_sent_when_they_have_changed(engine, tmp_path):
    sampler, _ = samplers_for(engine, tmp_path)
    for _ in range(2): sampler(ROWS)
    assert engine.made.sent == ["weights", "reset"]
    next(p for p in sampler.policy.lm.parameters() if p.requires_grad).data += .01
    for _ in range(2): sampler(ROWS)
    assert engine.made.sent == ["weights", "reset"] * 2


@pytest.mark.parametrize("reply, text", [
    (dict(completion_ids=[[]], logprobs=[[]]), "ValueError: 0 tokens and 0 log-probs for a completion of at most 14"),
    (dict(logprobs=[[[-1.]]]), "ValueError: 2 tokens and 1 log-probs"), (dict(logprobs=None), "TypeError")])
def test_a_wrong_reply_is_an_error(engine, tmp_path, reply, text):
    sampler, _ = samplers_for(engine, tmp_path)
    good = dict(completion_ids=[[7, 8]], logprobs=[[[-1.], [-2.]]])
    engine.generate = lambda self, *args, **kwargs: good
    assert not sampler(ROWS).ended.any()
    engine.generate = lambda self, *args, **kwargs: good | reply
    with pytest.raises(ConnectionError, match=f"^The vLLM server failed: {text}"): sampler(ROWS)


def test_where_a_completion_ends():
    _, tok = tiny_policy("bloom")
    sampling = Sampling(eos_token_ids=EOS)
    assert end_of([7, 8, EOS[1], 9], sampling) == (3, True) and end_of([7, 8], sampling) == (2, False)
    ids = tok("one two. three", add_special_tokens=False).input_ids
    n, ended = end_of(ids, Sampling(), stopper(tok, ["two"]))
    assert ended and "two" in tok.decode(ids[:n]) and "two" not in tok.decode(ids[:n - 1])


@pytest.mark.parametrize("arch", DECODERS)
def test_base_weights_are_those_of_pefts_merge(arch):
    policy, _ = policy_for(arch)
    before = [p.clone() for p in policy.parameters()]
    found = dict(base_weights(policy.lm))
    assert [*found] == [name for name, _ in tiny_policy(arch)[0].named_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    for name, p in policy.lm.merge_and_unload().named_parameters(): assert torch.equal(found[name], p)


def test_checksums_change_with_the_policy_alone():
    model, _ = tiny_policy("llama")
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    policy = ActorCritic(get_peft_model(model, lora), critic="adapter")
    trained = {name: p for name, p in policy.lm.named_parameters() if p.requires_grad}
    changed = []
    for p in trained.values():
        before = checksums(policy.lm)
        p.data += .01
        changed.append(checksums(policy.lm) != before)
    assert changed == [".critic." not in name for name in trained] and not all(changed)
    found = dict(base_weights(policy.lm))
    assert torch.equal(found["lm_head.weight"], policy.lm.get_output_embeddings().weight)
    assert [*found] == [name for name, _ in tiny_policy("llama")[0].named_parameters()]


@pytest.mark.parametrize("arch, lora, text", [
    ("bloom", dict(target_modules=["word_embeddings"]),
     "lm_head.weight is tied to another layer, and only one of them is adapted"),
    ("llama", dict(target_modules=["q_proj"], trainable_token_indices=[5]),
     "embed_tokens: single trained tokens are not weights of the base model")])
def test_an_adapter_that_the_base_model_has_no_weight_for(arch, lora, text):
    lm = get_peft_model(tiny_policy(arch)[0], LoraConfig(task_type="CAUSAL_LM", **lora))
    for merge in (True, False):
        with pytest.raises(ValueError, match=text): [*base_weights(lm, merge)]


def test_quantized_weights_are_refused(engine, tmp_path):
    policy, _ = policy_for()
    policy.lm.get_base_model().is_quantized = True
    with pytest.raises(ValueError, match="use_vllm: the server cannot take over weights in 8 or 4 bits"):
        VLLMSampler(policy.lm, config_for(tmp_path, engine), torch.device("cpu"))


def test_what_is_missing_is_said(engine, tmp_path):
    engine.logprobs_mode = "raw_logprobs"
    text = ("use_vllm: the server at http://0.0.0.0:8000 gives raw_logprobs; "
            "start it with --logprobs-mode processed_logprobs")
    with pytest.raises(ValueError, match=text): trainer_for(tmp_path, engine)
    def no_engine(*args): raise RuntimeError("has no weight-transfer engine")
    engine.logprobs_mode, engine.init_communicator = "processed_logprobs", no_engine
    with pytest.raises(ValueError, match="use_vllm: has no weight-transfer engine"): trainer_for(tmp_path, engine)


RANKS = """
import sys
sys.path.insert(0, sys.argv[3])
from accelerate.state import PartialState
from test_vllm import Engine, trainer_for
rank, rows = PartialState(cpu=True).process_index, int(sys.argv[2])
class Only(Engine):
    def __init__(self, *args, **kwargs):
        assert rank == 0, "a client in another process"
        super().__init__(*args, **kwargs)
trainer = trainer_for(sys.argv[1], Only, rows=rows)
trainer.train()
def fails(self, *args, **kwargs): raise Exception("gone")
Only.generate = fails
try: trainer.evaluate()
except ConnectionError as e: sys.stdout.write(f"RANK {rank}: {e}\\n")
PartialState().destroy_process_group()
"""


@pytest.mark.parametrize("env", [{}, pytest.param(FSDP, marks=pytest.mark.slow)], ids=["whole", "shards"])
def test_two_processes_ask_like_one(together, tmp_path, env):
    tables = []
    for world, rows in ((2, 2), (1, 4)):
        text = together(tmp_path/str(world), rows, ROOT/"tests", world=world, code=RANKS, env=env if world > 1 else {})
        said = sorted(line for line in text.splitlines() if "RANK" in line)
        assert said == [f"RANK {i}: The vLLM server failed: Exception: gone" for i in range(world)]
        folder = tmp_path/str(world)/"completions"
        kept = [pd.read_parquet(folder/f"{name}.parquet") for name in ("completions_00003", "eval_00003")]
        tables.append([table[["prompt", "completion", "length"]] for table in kept])
    assert all(a.equals(b) and len(a) for a, b in zip(*tables))


class Served(BaseHTTPRequestHandler):
    "As much of vLLM's server as the client asks for, but the weights: every token is 7, and likely to 1/e."
    posted = []

    def answer(self, said):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def do_GET(self):
        info = dict(vllm_config=dict(model_config=dict(logprobs_mode="processed_logprobs")))
        replies = {"/health": {}, "/v1/models": dict(data=[dict(id="served")]), "/server_info": info}
        self.answer(replies[self.path.split("?")[0]])

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.posted.append((self.path, json.loads(body) if body else None))
        tokens = dict(tokens=["token_id:7"] * 3, token_logprobs=[-1.] * 3, top_logprobs=[{"token_id:7": -1.}] * 3)
        self.answer(dict(choices=[dict(prompt_token_ids=[1], token_ids=[7] * 3, logprobs=tokens)]))

    def log_message(self, *args): pass


def test_trls_client_speaks_http(tmp_path, monkeypatch):
    pytest.importorskip("requests")
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda *args, **kwargs: True)
    sent = []
    class NoNccl(vllm_client.VLLMClient):
        def init_communicator(self, device=0): pass
        def update_named_params(self, metadata, named_params): sent.append(len(metadata))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Served)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        trainer = trainer_for(tmp_path, NoNccl, vllm_server_base_url=url, stop_strings=["zz"])
        out = trainer.rollout(ROWS)
    finally: server.shutdown(); server.server_close()
    assert out.tokens.response_ids.tolist() == [[7] * 3] * 5 and (out.sampling_logprobs == -1).all()
    assert sent == [len(trainer.sampler.client.shapes)]
    assert Served.posted[0] == ("/reset_prefix_cache", None)
    told = [body for path, body in Served.posted[1:]]
    prompts = [ids[mask > 0].tolist() for ids, mask in zip(*out.tokens[:2])]
    assert sorted(body["prompt"][0] for body in told) == sorted(prompts) and len({body["seed"] for body in told}) == 5
    want = dict(model="served", temperature=.8, top_p=1., top_k=0, min_p=0., repetition_penalty=1., n=1, max_tokens=14,
                min_tokens=2, logprobs=0, ignore_eos=True, stop_token_ids=list(trainer.sampler.eos_token_ids),
                stop=["zz"], skip_special_tokens=False, return_token_ids=True)
    assert all({k: body[k] for k in want} == want for body in told)
