"Every field of TrainingArguments and RLOOConfig acts on a PPO run, or is refused in one line that says why."
import logging
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import transformers
from accelerate.parallelism_config import ParallelismConfig
from conftest import ROOT
from huggingface_hub import HfApi
from kit import CHATS, PROMPTS, Calls, Events, Kit, keys, logged, moved, weights
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback
from trl import RLOOConfig

from rlhf_nb import PPOConfig, PPOTrainer, decoding
from rlhf_nb.config import NEUTRAL, OTHER_DEFAULTS, REFUSED, default_of, wanted_precision
from rlhf_nb.decoding import generate_static

sys.path.insert(0, str(ROOT/"docs"))
from settings import settings_table  # noqa: E402

ALL = {f.name for c in (TrainingArguments, RLOOConfig) for f in fields(c)}
FLAGS = {f.name: not f.default for f in fields(PPOConfig) if f.name in REFUSED and isinstance(f.default, bool)}
OTHERS = dict(label_smoothing_factor=.1, torch_compile_backend="inductor", torch_compile_mode="default",
              liger_kernel_config=dict(rope=True), neftune_noise_alpha=5., eval_accumulation_steps=2,
              include_for_metrics=["loss"], accelerator_config=dict(split_batches=True),
              parallelism_config=ParallelismConfig(), debug="underflow_overflow", dataloader_num_workers=2,
              dataloader_prefetch_factor=2, dataloader_multiprocessing_context="spawn", label_names=["labels"],
              train_sampling_strategy="sequential", length_column_name="len", ddp_find_unused_parameters=True,
              ddp_bucket_cap_mb=25, ddp_broadcast_buffers=True, ddp_static_graph=True, pad_to_multiple_of=8,
              vllm_model_impl="transformers", vllm_structured_outputs_regex="a*",
              vllm_gpu_memory_utilization=.5, vllm_max_model_length=512, vllm_tensor_parallel_size=2,
              transformers_continuous_batching_config=dict(max_batch_tokens=64))
WRONG = {name: FLAGS.get(name, OTHERS.get(name)) for name in REFUSED} # A value of each that is not its default
CHECKS = []


def acts(*names):
    "The test below shows that these settings act."
    def register(check):
        CHECKS.append((names, check))
        return check
    return register


@pytest.fixture
def kit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Kit(PPOTrainer, PPOConfig, tmp_path)


def optimizer(trainer): return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def steps(trainer, key="reward"):
    return [e["step"] for e in trainer.state.log_history if key in e and "train_loss" not in e]


def evaluated(kit, *positional, **named):
    return kit.train(*positional,
                     **dict(eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="steps", eval_steps=1) | named)


def completions(kit, **args):
    "Token ids of the first update."
    calls = Calls()
    kit.train(calls, max_steps=1, **args)
    return calls.of("completion_ids")[0]


def checkpoints(kit): return sorted(p.name for p in kit.out.glob("checkpoint-*"))


def rows_at_once(model, call):
    "Most rows in a forward pass."
    seen = []
    hook = model.register_forward_pre_hook(lambda module, args,
                                           kwargs: seen.append(len(kwargs["input_ids"]
                                                                   if "input_ids" in kwargs else args[0])),
                                           with_kwargs=True)
    call()
    hook.remove()
    return max(seen)


# Settings of TrainingArguments

@acts("output_dir")
def check_output_dir(kit, monkeypatch):
    kit.train(save_strategy="steps", save_steps=2, output_dir=kit.out/"a"/"b")
    assert (kit.out/"a"/"b"/"checkpoint-2").is_dir()

@acts("per_device_train_batch_size", "steps_per_generation", "generation_batch_size")
def check_batch(kit, monkeypatch):
    for rows, more in ((4, {}), (2, dict(per_device_train_batch_size=2)), (8, dict(steps_per_generation=2)),
                       (8, dict(generation_batch_size=8))):
        assert len(completions(kit, **more)) == rows

@acts("gradient_accumulation_steps", "num_iterations")
def check_optimizer_steps(kit, monkeypatch):
    for updates, more in ((2, {}), (1, dict(gradient_accumulation_steps=2)), (4, dict(num_iterations=2)),
                          (2, dict(num_iterations=2, gradient_accumulation_steps=2))):
        events = Events()
        kit.train(callbacks=[events], steps_per_generation=2, max_steps=1, **more)
        assert events.seen.count("on_optimizer_step") == updates, more

@acts("num_train_epochs", "max_steps")
def check_length_of_a_run(kit, monkeypatch):
    assert [kit.train(max_steps=n, num_train_epochs=e).state.global_step for n, e in ((-1, 1), (-1, .5), (3, 1))] == [4,
        2, 3]

@acts("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
def check_schedule(kit, monkeypatch):
    def rates(**more): return logged(kit.train(learning_rate=1., max_steps=4, **more), "learning_rate")
    assert rates() == [1, .75, .5, .25] and rates(lr_scheduler_type="constant") == [1]*4
    assert rates(lr_scheduler_type="constant_with_warmup", warmup_steps=2) == [0, .5, 1, 1]
    assert rates(lr_scheduler_type="polynomial", lr_scheduler_kwargs=dict(power=2., lr_end=0.)) == [1, .5625, .25,
        .0625]

@acts("optim", "optim_args")
def check_optim(kit, monkeypatch):
    made = optimizer(kit.trainer(optim="rmsprop", optim_args="momentum=0.5"))
    assert type(made) is torch.optim.RMSprop and made.param_groups[0]["momentum"] == .5

@acts("optim_target_modules")
def check_optim_target_modules(kit, monkeypatch):
    monkeypatch.setattr("transformers.trainer_optimizer.is_galore_torch_available", lambda: True)
    monkeypatch.setitem(sys.modules, "galore_torch",
                        SimpleNamespace(GaLoreAdamW=torch.optim.AdamW, GaLoreAdafactor=None, GaLoreAdamW8bit=None))
    with pytest.raises(ValueError, match="optim_target_modules"): kit.trainer(optim="galore_adamw")
    found = kit.trainer(optim="galore_adamw", optim_target_modules=["q_proj"]).optimizer.param_groups
    assert len([p for g in found if "rank" in g for p in g["params"] if p.requires_grad]) == 1

@acts("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
def check_adam(kit, monkeypatch):
    group = optimizer(kit.trainer(weight_decay=.1, adam_beta1=.8, adam_beta2=.95, adam_epsilon=1e-6)).param_groups[0]
    assert (group["weight_decay"], *group["betas"], group["eps"]) == (.1, .8, .95, 1e-6)

@acts("max_grad_norm")
def check_max_grad_norm(kit, monkeypatch):
    def way(**more):
        trainer = kit.trainer(optim="sgd", learning_rate=1., max_steps=1, lr_scheduler_type="constant", **more)
        before = {n: p.detach().clone() for n, p in trainer.policy.named_parameters()}
        trainer.train()
        return torch.cat([(p - before[n]).flatten() for n,
                          p in trainer.policy.named_parameters()]).norm().item(), logged(trainer, "grad_norm")[0]
    assert way(max_grad_norm=.01)[0] == pytest.approx(.01, rel=1e-3)
    moved, norm = way(max_grad_norm=0)
    assert moved == pytest.approx(norm, rel=1e-3)

@acts("bf16", "fp16")
def check_precision(kit, monkeypatch):
    assert kit.args(bf16=True).dtype == torch.bfloat16 and kit.args(bf16=False).dtype == torch.float32
    gpu = torch.device("cuda")
    assert [wanted_precision(SimpleNamespace(bf16=b, fp16=f, model_init_kwargs=None), gpu) for b,
            f in ((None, True), (True, False), (False, False))] == ["fp16", "bf16", "no"]
    with pytest.raises(ValueError, match="choose one"): kit.args(bf16=True, fp16=True)

@acts("tf32")
def check_tf32(kit, monkeypatch):
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    asked = []
    monkeypatch.setattr("transformers.training_args.enable_tf32", asked.append)
    kit.args(tf32=True)
    kit.args(tf32=False)
    assert asked == [True, False]

@acts("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing",
      "gradient_checkpointing_kwargs")
def check_activation_checkpointing(kit, monkeypatch):
    def passes(**more):
        trainer = kit.trainer(max_steps=1, **dict(gradient_checkpointing=None) | more)
        seen = []
        trainer.model.model.layers[0].mlp.register_forward_pre_hook(lambda *a: seen.append(1))
        trainer.train()
        return len(seen)
    usual = passes(generation_kwargs=dict(suppress_tokens=[1]))
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        assert passes(generation_kwargs=dict(suppress_tokens=[1]),
                      **{name: True}) == usual + 1, "the layer is computed once more in the backward pass"
        with pytest.raises(ValueError, match="use_reentrant"):
            kit.args(**dict(gradient_checkpointing=None) | {name: True, f"{name}_kwargs": dict(use_reentrant=True)})

@acts("torch_empty_cache_steps")
def check_torch_empty_cache_steps(kit, monkeypatch):
    emptied = []
    monkeypatch.setattr("rlhf_nb.trainer.clear_device_cache", lambda *a, **k: emptied.append(1))
    kit.train(max_steps=4, torch_empty_cache_steps=2)
    assert len(emptied) == 2

@acts("logging_strategy", "logging_steps", "logging_first_step")
def check_logging(kit, monkeypatch):
    assert steps(kit.train(max_steps=4, logging_steps=2)) == [2,
                                                              4] and steps(kit.train(max_steps=4,
        logging_steps=.5)) == [2, 4]
    assert steps(kit.train(max_steps=4, logging_steps=2, logging_first_step=True)) == [1, 2, 4]
    assert steps(kit.train(logging_strategy="no")) == [] and steps(kit.train(max_steps=4,
        logging_strategy="epoch")) == [4]

@acts("log_on_each_node", "save_on_each_node")
def check_other_nodes(kit, monkeypatch):
    monkeypatch.setattr(PPOConfig, "process_index", 8)
    monkeypatch.setattr(PPOConfig, "local_process_index", 0)
    assert [kit.args(log_on_each_node=x).should_log for x in (True, False)] == [True, False]
    assert [kit.args(save_on_each_node=x).should_save for x in (True, False)] == [True, False]

@acts("include_num_input_tokens_seen")
def check_input_tokens(kit, monkeypatch):
    for include in ("all", "no"):
        there = "num_input_tokens_seen" in keys(kit.train(include_num_input_tokens_seen=include))
        assert there is (include == "all")

@acts("log_level", "log_level_replica")
def check_log_level(kit, monkeypatch):
    before = transformers.logging.get_verbosity()
    try:
        kit.trainer(log_level="error")
        assert transformers.logging.get_verbosity() == logging.ERROR
    finally: transformers.logging.set_verbosity(before)
    monkeypatch.setattr(PPOConfig, "should_log", False)
    assert kit.args(log_level_replica="critical").get_process_log_level() == logging.CRITICAL

@acts("disable_tqdm")
def check_disable_tqdm(kit, monkeypatch):
    kinds = [{type(c).__name__ for c in kit.trainer(disable_tqdm=x).callback_handler.callbacks} for x in (True, False)]
    assert len(kinds[1] - kinds[0]) == 1 and not kinds[0] - kinds[1]

@acts("report_to")
def check_report_to(kit, monkeypatch):
    def reports(**more):
        return any(isinstance(c, TensorBoardCallback) for c in kit.trainer(**more).callback_handler.callbacks)
    assert reports(report_to="tensorboard") and reports(report_to=["tensorboard"]) and not reports(report_to="none")
    kit.train(report_to="tensorboard")
    assert [*kit.out.rglob("events.out.tfevents.*")]

@acts("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
def check_trackers(kit, monkeypatch):
    told = []
    class Settings(dict):
        def update(self, *positional, **named): pass
    space = SimpleNamespace(get=lambda: "me/space")
    trackio = SimpleNamespace(init=lambda **kwargs: told.append(kwargs), freeze=lambda **kwargs: told.append(kwargs),
                              log=lambda *a, **k: None, finish=lambda: None, config=Settings(),
                              context_vars=SimpleNamespace(current_space_id=space), __version__="1",
                              Table=lambda **kwargs: None, Histogram=lambda *a, **k: None)
    monkeypatch.setitem(sys.modules, "trackio", trackio)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_trackio_available", lambda: True)
    kit.train(report_to="trackio", run_name="first", project="mine", trackio_space_id="me/space",
              trackio_bucket_id="me/bucket", trackio_static_space_id="me/static")
    assert {k: told[0][k] for k in ("project", "name", "space_id", "bucket_id")} == dict(project="mine", name="first",
        space_id="me/space", bucket_id="me/bucket")
    assert told[1]["new_space_id"] == "me/static"

@acts("eval_strategy", "eval_steps", "eval_delay", "eval_on_start")
def check_when_to_evaluate(kit, monkeypatch):
    def when(**more): return steps(evaluated(kit, max_steps=4, **more), "eval_reward")
    assert (when(eval_steps=2), when(eval_steps=.5), when(eval_delay=3), when(eval_strategy="epoch"),
            when(eval_strategy="no")) == ([2, 4], [2, 4], [3, 4], [4], [])
    assert when(eval_steps=2, eval_on_start=True) == [0, 2, 4]

@acts("per_device_eval_batch_size")
def check_eval_batch(kit, monkeypatch):
    trainer = kit.trainer(eval_dataset=kit.data())
    for rows in (2, 8):
        trainer.args.per_device_eval_batch_size = rows
        assert rows_at_once(trainer.model, trainer.evaluate) == rows

@acts("save_strategy", "save_steps", "save_total_limit", "save_only_model")
def check_checkpoints(kit, monkeypatch):
    for there, more in ((["checkpoint-2", "checkpoint-4"], dict(save_steps=2)),
                        (["checkpoint-4"], dict(save_steps=2, save_total_limit=1)),
                        (["checkpoint-4"], dict(save_strategy="epoch")), ([], dict(save_strategy="no"))):
        kit.out = kit.out/"next"
        kit.train(max_steps=4, **dict(save_strategy="steps") | more)
        assert checkpoints(kit) == there, more
    whole, model = (kit.train(max_steps=1, save_strategy="steps", save_steps=1, save_only_model=x,
                              output_dir=kit.out/str(x)).args.output_dir for x in (False, True))
    sizes = [sum(p.stat().st_size for p in Path(folder, "checkpoint-1").glob("*.safetensors"))
             for folder in (whole, model)]
    assert sizes[0] > 2*sizes[1], "the optimizer has two numbers per weight"
    AutoModelForCausalLM.from_pretrained(Path(model, "checkpoint-1"))

@acts("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_revision")
def check_hub(kit, monkeypatch):
    made, sent = [], []
    def create(self, repo_id, **kwargs):
        made.append((self.token, repo_id, kwargs.get("private")))
        return SimpleNamespace(repo_id=repo_id)
    monkeypatch.setattr(HfApi, "create_repo", create)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, *a, **k: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda self,
                        **kwargs: sent.append((kwargs["repo_id"], kwargs.get("revision"))))
    hub = dict(push_to_hub=True, hub_token="hf_x", hub_private_repo=True, hub_model_id="me/model", hub_revision="next")
    counts = {}
    for strategy in ("every_save", "end"):
        trainer = kit.train(save_strategy="steps", save_steps=1, hub_strategy=strategy, output_dir=kit.out/strategy,
                            **hub)
        counts[strategy] = len(sent)
        trainer.save_model()
        assert {*sent} == {("me/model", "next")} and {*made} == {("hf_x", "me/model", True)}
        del sent[:]
    assert counts["every_save"] > counts["end"]

@acts("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
def check_best(kit, monkeypatch):
    def reward(completions, trainer_state, **kwargs): return [float(-trainer_state.global_step)]*len(completions)
    for first, greater in (("checkpoint-1", True), ("checkpoint-3", False)):
        trainer = evaluated(kit, reward, save_strategy="steps", save_steps=1, max_steps=3, learning_rate=.1,
                            metric_for_best_model="eval_reward", greater_is_better=greater, load_best_model_at_end=True,
                            output_dir=kit.out/first)
        best = AutoModelForCausalLM.from_pretrained(kit.out/first/first)
        assert Path(trainer.state.best_model_checkpoint).name == first
        assert all(torch.allclose(p, trainer.model.get_parameter(n)) for n, p in best.named_parameters())

@acts("ignore_data_skip", "resume_from_checkpoint")
def check_resume(kit, monkeypatch):
    kit.train(save_strategy="steps", save_steps=2)
    for ignore, first in ((False, PROMPTS[4]), (True, PROMPTS[0])):
        calls = Calls()
        trainer = kit.train(calls, max_steps=3, resume_from_checkpoint=str(kit.out/"checkpoint-2"),
                            ignore_data_skip=ignore)
        assert trainer.state.global_step == 3 and len(calls.seen) == 1 and calls.of("prompts")[0][0] == first

@acts("restore_callback_states_from_checkpoint")
def check_callback_states(kit, monkeypatch):
    best = dict(load_best_model_at_end=True, metric_for_best_model="eval_reward", greater_is_better=True,
                save_strategy="steps", save_steps=1)
    def falling(completions, trainer_state, **kwargs): return [float(-trainer_state.global_step)]*len(completions)
    evaluated(kit, falling, callbacks=[EarlyStoppingCallback(early_stopping_patience=5)], max_steps=2, **best)
    for restore, counter in ((True, 2), (False, 1)):
        trainer = evaluated(kit, falling, callbacks=[EarlyStoppingCallback(early_stopping_patience=5)], max_steps=3,
                            resume_from_checkpoint=str(kit.out/"checkpoint-2"),
                            restore_callback_states_from_checkpoint=restore, **best)
        stopping = next(c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        assert stopping.early_stopping_patience_counter == counter

@acts("full_determinism")
def check_full_determinism(kit, monkeypatch):
    monkeypatch.setattr("os.environ", dict(os.environ))
    try:
        kit.trainer(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally: torch.use_deterministic_algorithms(False)

@acts("seed", "data_seed", "shuffle_dataset")
def check_seeds(kit, monkeypatch):
    def run(**more):
        calls = Calls()
        kit.train(calls, **more)
        return calls.of("prompts"), calls.of("completion_ids")
    first, again, other, order = run(shuffle_dataset=True, seed=1), run(shuffle_dataset=True,
        seed=1), run(shuffle_dataset=True, seed=2), run(shuffle_dataset=True, seed=1, data_seed=2)
    assert first == again and first[0] != other[0] and order[0] == other[0]
    same, another = run(seed=1), run(seed=2)
    assert same[0] == another[0] == [[p for p in PROMPTS[s:s + 2] for _ in range(2)]
                                     for s in (0, 2)] and same[1] != another[1]

@acts("use_cpu")
def check_use_cpu(kit, monkeypatch):
    assert kit.args(use_cpu=True).device.type == "cpu" and kit.trainer().model.device.type == "cpu"

@acts("remove_unused_columns")
def check_columns(kit, monkeypatch):
    for remove in (True, False):
        calls = Calls()
        kit.train(calls, train_dataset=kit.data(answer=list("abcdefgh")), remove_unused_columns=remove)
        assert ("answer" in calls.seen[0]) is not remove

@acts("ddp_backend", "ddp_timeout")
def check_process_group(kit, monkeypatch):
    args = kit.args(ddp_timeout=77)
    assert args.ddp_timeout_delta.total_seconds() == 77
    asked = {}
    class Asked(Exception): pass
    def state(*positional, **kwargs):
        asked.update(kwargs)
        raise Asked
    monkeypatch.setattr("transformers.training_args.PartialState", state)
    with pytest.raises(Asked): kit.args(ddp_backend="gloo", ddp_timeout=77)
    assert asked["backend"] == "gloo"

@acts("fsdp", "fsdp_config", "deepspeed")
def check_strategies(kit, monkeypatch):
    args = kit.args(fsdp=True, fsdp_config=dict(version=2, cpu_offload=True))
    assert args.fsdp_plugin_args["fsdp_version"] == 2 and args.fsdp_plugin_args["cpu_offload"]
    with pytest.raises(Exception, match="(?i)deepspeed"):
        kit.trainer(deepspeed=dict(zero_optimization=dict(stage=3), train_micro_batch_size_per_gpu=1))

@acts("do_train", "do_eval")
def check_flags_of_scripts(kit, monkeypatch):
    assert kit.args(do_train=True).do_train and kit.args(eval_strategy="steps",
                                                         eval_steps=1).do_eval and not kit.args().do_eval

@acts("local_rank")
def check_local_rank(kit, monkeypatch):
    assert kit.args(local_rank=0).local_process_index == 0, "launchers of old pass it; the environment decides"


# Settings of RLOOConfig

@acts("model_init_kwargs")
def check_model_init_kwargs(kit, monkeypatch):
    assert kit.trainer(model_init_kwargs=dict(attn_implementation="eager")).model.config._attn_implementation == "eager"

@acts("trust_remote_code")
def check_trust_remote_code(kit, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(kit.policy)
    model.config.auto_map = dict(AutoModelForCausalLM="mine.MyModel")
    folder = kit.out/"remote"
    model.save_pretrained(folder)
    kit.trainer().processing_class.save_pretrained(folder)
    (folder/"mine.py").write_text("from transformers import LlamaForCausalLM\nclass MyModel(LlamaForCausalLM): pass\n")
    assert [type(kit.trainer(model=str(folder), trust_remote_code=x).model).__name__
            for x in (True, False)] == ["MyModel", "LlamaForCausalLM"]

@acts("router_aux_loss_coef")
def check_router_aux_loss(kit, monkeypatch):
    experts = str(kit.models/"experts")
    losses = {x: logged(kit.train(model=experts, router_aux_loss_coef=x, max_steps=1), "loss")[0] for x in (0., 1.)}
    assert losses[1.] > losses[0.] + .5
    with pytest.raises(ValueError, match="router_aux_loss_coef"): kit.trainer(router_aux_loss_coef=.5)

@acts("disable_dropout")
def check_disable_dropout(kit, monkeypatch):
    def rates(**more):
        return {m.p for m in kit.trainer(model=str(kit.models/"gpt2"), **more).model.modules()
                if isinstance(m, torch.nn.Dropout)}
    assert rates(disable_dropout=True) == {0.} and rates() != {0.}

@acts("num_generations", "num_generations_eval")
def check_num_generations(kit, monkeypatch):
    calls = Calls()
    trainer = kit.trainer(calls, num_generations=4, num_generations_eval=3, eval_dataset=kit.data(PROMPTS[:1]),
                          max_steps=1)
    trainer.train()
    trainer.evaluate()
    assert calls.of("prompts") == [[PROMPTS[0]]*4, [PROMPTS[0]]*3]

@acts("chat_template_kwargs")
def check_chat_template_kwargs(kit, monkeypatch):
    def used(**more):
        calls = Calls()
        trainer = kit.train(calls, train_dataset=kit.data(CHATS), max_steps=1, **more)
        return trainer.state.num_input_tokens_seen - sum(map(len, calls.of("completion_ids")[0]))
    assert used(chat_template_kwargs=dict(calm=True)) == used() + 4

@acts("max_completion_length")
def check_max_completion_length(kit, monkeypatch):
    assert max(map(len, completions(kit, max_completion_length=7))) == 7

@acts("temperature", "top_p", "top_k", "min_p", "generation_kwargs")
def check_sampling(kit, monkeypatch):
    greedy = completions(kit, top_k=1)
    assert greedy[0] == greedy[1] and greedy[2] == greedy[3]
    for more in (dict(temperature=1e-4), dict(top_p=1e-6), dict(min_p=1.), dict(generation_kwargs=dict(top_k=1))):
        assert completions(kit, **more) == greedy, more
    assert completions(kit) != greedy

@acts("repetition_penalty")
def check_repetition_penalty(kit, monkeypatch):
    rows = completions(kit, top_k=1, repetition_penalty=1e4, max_completion_length=8)
    assert all(len({*ids}) == len(ids) for ids in rows)

@acts("ds3_gather_for_generation", "use_vllm", "vllm_mode", "vllm_server_base_url", "vllm_server_host",
      "vllm_server_port", "vllm_server_timeout", "vllm_group_port")
def check_vllm(kit, monkeypatch):
    asked = {}
    def client(*positional, **kwargs):
        asked.update(kwargs)
        raise ConnectionError("no server")
    monkeypatch.setattr("trl.generation.vllm_client.VLLMClient", client)
    here = dict(use_vllm=True, vllm_server_timeout=7., vllm_group_port=1234)
    with pytest.raises(ValueError, match="no server"):
        kit.trainer(vllm_server_host="10.0.0.1", vllm_server_port=99, **here)
    assert {*asked.values()} == {7., 1234, "http://10.0.0.1:99"}
    with pytest.raises(ValueError, match="no server"): kit.trainer(vllm_server_base_url="http://gpu:8", **here)
    assert "http://gpu:8" in asked.values()
    with pytest.raises(ValueError, match="vllm_mode"): kit.args(use_vllm=True, vllm_mode="colocate")
    with pytest.raises(ValueError, match="ds3_gather_for_generation"):
        kit.args(use_vllm=True, ds3_gather_for_generation=False)

@acts("cache_implementation")
def check_cache_implementation(kit, monkeypatch):
    calls = []
    def counted(*given):
        calls.append(given)
        return generate_static(*given)
    monkeypatch.setattr(decoding, "generate_static", counted)
    plain = completions(kit)
    assert not calls, "the default on a CPU"
    assert completions(kit, cache_implementation="dynamic") == plain and not calls
    assert completions(kit, cache_implementation="static") == plain and calls
    with pytest.raises(ValueError, match="cache_implementation"): kit.args(cache_implementation="offloaded")

@acts("reward_weights", "reward_clip_range")
def check_rewards(kit, monkeypatch):
    def one(completions, **kwargs): return [1.]*len(completions)
    def nine(completions, **kwargs): return [9.]*len(completions)
    trainer = kit.train([one, nine], reward_weights=[.5, 2.], reward_clip_range=(-1, 3))
    assert logged(trainer, "reward")[0] == 18.5 and logged(trainer, "objective/shaped_reward")[0] == 3

@acts("mask_truncated_completions")
def check_mask_truncated(kit, monkeypatch):
    for mask in (True, False):
        trainer = kit.trainer(mask_truncated_completions=mask, generation_kwargs=dict(suppress_tokens=[1]))
        before = weights(trainer.model)
        trainer.train()
        assert bool(moved(trainer, before)) is not mask

@acts("beta")
def check_beta(kit, monkeypatch):
    none, some = kit.train(beta=0., learning_rate=.1), kit.train(beta=.7, learning_rate=.1)
    assert none.ref_model is None and "kl" not in keys(none) and logged(some, "objective/kl_coef") == [.7, .7]
    assert logged(some, "objective/non_score_reward")[-1] == pytest.approx(-.7*logged(some, "objective/kl")[-1])

@acts("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
def check_sync_ref_model(kit, monkeypatch):
    for more, changed in ((dict(), False),
                          (dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=1.), True),
                          (dict(sync_ref_model=True, ref_model_sync_steps=9), False),
                          (dict(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.), False)):
        trainer = kit.trainer(learning_rate=.1, **more)
        before = weights(trainer.ref_model)
        trainer.train()
        after = weights(trainer.ref_model)
        assert any(not torch.equal(p, after[n]) for n, p in before.items()) is changed, more
        if changed: assert all(torch.allclose(p, after[n]) for n, p in trainer.model.named_parameters())

@acts("epsilon", "epsilon_high")
def check_clip_range(kit, monkeypatch):
    def clipped(**more):
        trainer = kit.train(learning_rate=.05, num_iterations=4, max_steps=1, **more)
        return logged(trainer, "clip_ratio/low_mean")[0], logged(trainer, "clip_ratio/high_mean")[0]
    narrow, wide, high = clipped(epsilon=1e-6), clipped(epsilon=1e6), clipped(epsilon=1e-6, epsilon_high=1e6)
    assert min(narrow) > 0 and wide == (0, 0) and high[0] > 0 and high[1] == 0

@acts("normalize_advantages")
def check_normalize_advantages(kit, monkeypatch):
    seen = {}
    for normalize in (True, False):
        trainer = kit.train(lambda completions, **kwargs: [100. + i for i in range(len(completions))],
                            normalize_advantages=normalize, max_steps=1)
        seen[normalize] = trainer.completions.numbers["advantages"]
    assert abs(seen[True].mean()) < 1e-3 and seen[True].std() == pytest.approx(1, abs=.05) and seen[False].mean() > 5

@acts("log_completions", "num_completions_to_print", "log_unique_prompts")
def check_log_completions(kit, monkeypatch):
    for name, more in dict(without={}, kept=dict(log_completions=True)).items():
        kit.train(output_dir=kit.out/name, **more)
    tables = {name: [pd.read_parquet(p) for p in (kit.out/name).rglob("*.parquet")] for name in ("without", "kept")}
    assert not tables["without"] and sum(map(len, tables["kept"])) == 8
    def shown(**more):
        trainer = kit.train(log_completions=True, **more)
        return trainer.completions.samples(trainer.args).prompt.tolist()
    assert shown(num_completions_to_print=1) == [PROMPTS[2]]
    assert shown(num_completions_to_print=4) == [PROMPTS[2]]*2 + [PROMPTS[3]]*2
    assert shown(num_completions_to_print=4, log_unique_prompts=True) == PROMPTS[2:4]


# The tests

def test_defaults_differ_where_the_table_says_so():
    theirs, mine = ({f.name: default_of(f) for f in fields(c)} for c in (RLOOConfig, PPOConfig))
    differ = {name for name, value in theirs.items() if mine[name] != value}
    assert differ | {"bf16"} == {*OTHER_DEFAULTS}, "bf16 is chosen after construction in both"


def test_documentation_has_every_setting():
    rows = {re.match(r"\| `(\w+)`", line)[1]: line for line in settings_table().splitlines() if line.startswith("| `")}
    assert rows.keys() == {f.name for f in fields(PPOConfig)}
    for name, row in rows.items():
        assert row.count(" | ") == 3 and row.split(" | ")[2], f"nothing is said of {name}"
        assert ("Refused" in row) is (name in REFUSED) and (OTHER_DEFAULTS.get(name,
            "only here") in row) is (name in OTHER_DEFAULTS or name not in ALL)


def test_every_field_acts_or_is_refused():
    shown = [name for names, _ in CHECKS for name in names]
    assert len(shown) == len({*shown}), "a setting is shown twice"
    assert not {*shown} & {*REFUSED}
    assert ALL == {*shown} | {*REFUSED}, (ALL - {*shown} - {*REFUSED}, {*shown, *REFUSED} - ALL)
    assert {f.name for f in fields(PPOConfig)} >= ALL


@pytest.mark.parametrize("names, check", CHECKS, ids=[check.__name__.removeprefix("check_") for _, check in CHECKS])
def test_settings_act(names, check, kit, monkeypatch): check(kit, monkeypatch)


@pytest.mark.parametrize("name", [n for n in REFUSED if n not in NEUTRAL or NEUTRAL[n] != WRONG[n]])
def test_refused(name, tmp_path):
    with pytest.raises(ValueError) as found: PPOConfig(str(tmp_path), **{name: WRONG[name]})
    said = str(found.value)
    assert said.startswith(f"{name}=") and REFUSED[name] in said and "\n" not in said


def test_refused_ones_are_said_together(tmp_path):
    with pytest.raises(ValueError) as found: PPOConfig(str(tmp_path), torch_compile=True, do_predict=True)
    assert "torch_compile=True" in str(found.value) and "do_predict=True" in str(found.value)


def test_what_changes_nothing_is_not_refused(tmp_path):
    args = PPOConfig(str(tmp_path), use_cpu=True, **NEUTRAL)
    PPOConfig(str(tmp_path), use_cpu=True, **{name: getattr(args, name) for name in REFUSED})
