"Answers from a vLLM server, with a stand-in for the client: what is sent, what comes of it, and that nothing else changes."
import inspect
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
import torch
from conftest import ROOT
from datasets import Dataset
from engine import Engine, drawn_by
from peft import LoraConfig, get_peft_model
from test_shards import FSDP
from trl.generation import vllm_client

from rlhf_nb.config import PPOConfig
from rlhf_nb.models import Policy, lora_targets
from rlhf_nb.ppo import importance_weights
from rlhf_nb.rollout import write
from rlhf_nb.tiny import tiny_policy
from rlhf_nb.trainer import PPOTrainer, make_experience

PROMPTS = Dataset.from_dict(dict(prompt=["Why?", "What helps against a cough at night, and how soon?", "Fever", "Hiccups", "Rest or walk?"]))
NAMES = ["__init__", "generate", "update_named_params", "reset_prefix_cache", "get_server_info", "init_communicator"]


def trainer_for(folder, engine=None, lora=True, **settings):
    "A small run; with an engine, through the seam."
    model, tok = tiny_policy("bloom", initializer_range=.2)
    torch.manual_seed(0)
    if lora: model = get_peft_model(model, LoraConfig(r=4, target_modules=lora_targets(model), task_type="CAUSAL_LM"))
    kw = dict(output_dir=str(folder), batch_size=4, mini_batch_size=4, num_ppo_epochs=2, max_steps=3, max_target_length=14, min_target_length=2, temperature=.8,
              learning_rate=1e-2, adam_epsilon=1e-3, save_steps=0, torch_dtype="float32", log_with="none", disable_tqdm=True, use_vllm=engine is not None, do_eval=True)
    with pytest.MonkeyPatch.context() as patch:
        if engine: patch.setattr(vllm_client, "VLLMClient", engine)
        trainer = PPOTrainer(Policy(model), lambda prompts, completions, **k: [c.count("e") / 5 for c in completions], PPOConfig(**kw | settings), PROMPTS, PROMPTS, tok)
    trainer.sampling = trainer.sampling._replace(eos_token_ids=(tok.eos_token_id, *range(5, 1000, 7)))
    return trainer


def with_an_engines_draws(policy, queries, sampling, max_length, pad_id, uniforms, batch_size, stop):
    "The policy itself, with the draws of a seed for each prompt."
    if uniforms is not None: uniforms = torch.cat([drawn_by(int(u * 2**24), max_length) for u in uniforms[:, 0].double()])
    return write(policy, queries, sampling, max_length, pad_id, uniforms, batch_size, stop)


@pytest.fixture
def engine(): return type("OwnEngine", (Engine,), {})


def timeless(history): return [{k: v for k, v in e.items() if not k.startswith(("time", "tokens/second"))} for e in history]
def weights(trainer): return torch.cat([p.detach().flatten() for p in trainer.trained])


@pytest.mark.parametrize("name", NAMES)
def test_the_stand_in_has_the_signatures_of_trl(name):
    plain = lambda f: [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
    assert plain(getattr(Engine, name)) == plain(getattr(vllm_client.VLLMClient, name))


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_through_the_seam_is_the_run_without(engine, tmp_path, lora):
    through, without = trainer_for(tmp_path/"a", engine, lora), trainer_for(tmp_path/"b", lora=lora)
    without.writer = with_an_engines_draws
    for trainer in (through, without): trainer.train()
    for a, b in zip(timeless(through.state.log_history), timeless(without.state.log_history), strict=True): assert a == pytest.approx(b, rel=1e-3, abs=2e-5)
    torch.testing.assert_close(weights(through), weights(without), rtol=0, atol=1e-5)
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
    straight = trainer_for(tmp_path/"a", engine, do_eval=False)
    straight.train()
    asked, halfway = list(engine.made.asked), trainer_for(tmp_path/"b", engine, do_eval=False, save_steps=2, max_steps=2)
    halfway.train()
    resumed = trainer_for(tmp_path/"b", engine, do_eval=False)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(engine.made.asked) == sorted(asked[8:]) and len({seed for _, seed in asked}) == 12
    assert torch.equal(weights(resumed), weights(straight))


def test_what_the_engine_rounds_is_weighed(engine, tmp_path):
    engine.as_served = lambda self, weight: weight.bfloat16().float()
    trainer = trainer_for(tmp_path, engine, importance_sampling_cap=1.01)
    answers = trainer.rollout(list(PROMPTS))
    exp = make_experience(answers, trainer.score(answers).total, trainer.args, .2)
    on = answers.response_mask > 0
    assert torch.equal(exp.weights, importance_weights(answers.logprobs, answers.sampling_logprobs, 1.01))
    assert exp.weights[on].max() == torch.tensor(1.01) and exp.weights[on].min() < .99 and exp.weights[on].std() > 1e-3
    look = trainer.policy(*answers[3:7], trainer.sampling).logprobs
    torch.testing.assert_close(answers.logprobs[on], look.detach()[on], rtol=0, atol=1e-5)
    assert trainer.step(answers, trainer.score(answers))["sampling/sampling_logp_difference/mean"] > 1e-3


def test_the_engine_that_stops_late_is_cut(engine, tmp_path):
    plain = trainer_for(tmp_path/"a", engine)
    free = plain.rollout(list(PROMPTS), torch.Generator().manual_seed(3))
    text = max(free.completions, key=len)
    stopping = trainer_for(tmp_path/"b", engine, stop_strings=[text[2:4]])
    cut = stopping.rollout(list(PROMPTS), torch.Generator().manual_seed(3))
    assert cut.completions == [c.split(text[2:4])[0] for c in free.completions] != free.completions
    assert all(done for done, c in zip(cut.ended, free.completions) if text[2:4] in c)


def test_a_server_that_fails_ends_the_run_with_its_words(engine, tmp_path):
    trainer = trainer_for(tmp_path, engine, do_eval=False, max_steps=9)
    generate = engine.generate
    def full(self, *args, **kwargs):
        if len(self.asked) >= 8: raise Exception("Request failed: 500, the engine is dead")
        return generate(self, *args, **kwargs)
    engine.generate = full
    with pytest.raises(ConnectionError, match="The vLLM server failed: Exception: Request failed: 500, the engine is dead"): trainer.train()
    assert (tmp_path/"checkpoint-2").exists()


def test_what_is_missing_is_said(engine, tmp_path):
    engine.logprobs_mode = "raw_logprobs"
    with pytest.raises(ValueError, match="use_vllm: the server at http://localhost:8000 gives raw_logprobs; start it with --logprobs-mode processed_logprobs"): trainer_for(tmp_path, engine)
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
trainer = trainer_for(sys.argv[1], Only, batch_size=rows, mini_batch_size=rows)
trainer.train()
def fails(self, *args, **kwargs): raise Exception("gone")
Only.generate = fails
try: trainer.evaluate()
except ConnectionError as e: sys.stdout.write(f"RANK {rank}: {e}\\n")
PartialState().destroy_process_group()
"""


@pytest.mark.parametrize("env", [{}, FSDP], ids=["whole", "shards"])
def test_two_processes_ask_like_one(together, tmp_path, env):
    tables = []
    for world, rows in ((2, 2), (1, 4)):
        text = together(tmp_path/str(world), rows, ROOT/"tests", world=world, code=RANKS, env=env if world > 1 else {})
        assert sorted(line for line in text.splitlines() if "RANK" in line) == [f"RANK {i}: The vLLM server failed: Exception: gone" for i in range(world)]
        tables.append([pd.read_parquet(tmp_path/str(world)/"completions"/f"{name}.parquet")[["prompt", "completion", "length"]] for name in ("completions_00003", "eval_00003")])
    assert all(a.equals(b) and len(a) for a, b in zip(*tables))


class Served(BaseHTTPRequestHandler):
    "As much of vLLM's server as the client asks for, but the weights: every token is 7, and likely to 1/e."
    posted = []

    def answer(self, said):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    def do_GET(self):
        self.answer({"/health": {}, "/v1/models": dict(data=[dict(id="served")]),
                     "/server_info": dict(vllm_config=dict(model_config=dict(logprobs_mode="processed_logprobs")))}[self.path.split("?")[0]])

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
        trainer = trainer_for(tmp_path, NoNccl, vllm_server_base_url=f"http://127.0.0.1:{server.server_port}", stop_strings=["zz"])
        out = trainer.rollout(list(PROMPTS))
    finally: server.shutdown(); server.server_close()
    assert out.response_ids.tolist() == [[7] * 3] * 5 and (out.sampling_logprobs == -1).all() and sent == [len(trainer.writer.shapes)]
    assert Served.posted[0] == ("/reset_prefix_cache", None)
    told = [body for path, body in Served.posted[1:]]
    prompts = [ids[mask > 0].tolist() for ids, mask in zip(out.query_ids, out.query_mask)]
    assert sorted(body["prompt"][0] for body in told) == sorted(prompts) and len({body["seed"] for body in told}) == 5
    want = dict(model="served", temperature=.8, top_p=1., top_k=0, min_p=0., repetition_penalty=1., n=1, max_tokens=14, min_tokens=2, logprobs=0, ignore_eos=True,
                stop_token_ids=list(trainer.sampling.eos_token_ids), stop=["zz"], skip_special_tokens=False, return_token_ids=True)
    assert all({k: body[k] for k in want} == want for body in told)
