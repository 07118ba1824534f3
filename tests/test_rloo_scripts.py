"""Scripts written for `RLOOTrainer`, run as they are and with the class names changed: a user sees the same.

A script returns what a user sees. Both libraries must return the same; where a value is a set, PPO may show more."""
import asyncio
import contextlib
import functools
import io
import json
import logging
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import HfApi
from kit import CHATS, PROMPTS, Calls, Events, Kit, fails, keys, length, logged, moved, reds, weights
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EarlyStoppingCallback,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import (
    BEMACallback,
    ModelConfig,
    RichProgressCallback,
    RLOOConfig,
    RLOOTrainer,
    ScriptArguments,
    TrlParser,
    get_peft_config,
)

from rlhf_nb import PPOConfig, PPOTrainer

SCRIPTS = {}
def script(function):
    SCRIPTS[function.__name__] = function
    return function


# What a script gives to the constructor

@script
def positional_arguments(kit):
    trainer = kit.Trainer(kit.policy, length, kit.args(), kit.data(), kit.data(PROMPTS[:2]),
                          AutoTokenizer.from_pretrained(kit.policy))
    trainer.train()
    return dict(steps=trainer.state.global_step, evaluated={*trainer.evaluate()} >= {"eval_reward"})

@script
def classes_are_transformers_own(kit):
    return dict(trainer=issubclass(kit.Trainer, Trainer), config=issubclass(kit.Config, TrainingArguments),
                first=kit.Config("run", use_cpu=True, bf16=False).output_dir)

@script
def model_in_memory(kit):
    trainer = kit.train(model=AutoModelForCausalLM.from_pretrained(kit.policy))
    return dict(steps=trainer.state.global_step, kind=type(trainer.model).__name__)

@script
def model_init_kwargs(kit):
    trainer = kit.trainer(model_init_kwargs=dict(attn_implementation="eager", dtype="float32"))
    return dict(attention=trainer.model.config._attn_implementation, dtype=trainer.model.dtype)

@script
def model_init_kwargs_as_text(kit):
    model = kit.trainer(model_init_kwargs='{"attn_implementation": "eager"}').model
    return dict(attention=model.config._attn_implementation)

@script
def tokenizer_without_pad(kit):
    tokenizer = AutoTokenizer.from_pretrained(kit.policy)
    tokenizer.pad_token = None
    trainer = kit.train(processing_class=tokenizer)
    return dict(pad=trainer.processing_class.pad_token, steps=trainer.state.global_step)

@script
def no_train_dataset(kit): return dict(error=fails(kit.Trainer, kit.policy, length, kit.args()))

@script
def train_dataset_is_a_list(kit):
    return dict(error=fails(kit.Trainer, kit.policy, length, kit.args(), [dict(prompt="red")]))

@script
def no_prompt_column(kit):
    return dict(fails=bool(fails(lambda: kit.train(train_dataset=Dataset.from_dict(dict(text=PROMPTS))))))

@script
def unknown_setting(kit): return dict(error=fails(kit.Config, kit.out, no_such_setting=1))

@script
def attributes_that_scripts_read(kit):
    trainer = kit.train(eval_dataset=kit.data(PROMPTS[:2]), reward_funcs=[length, kit.judge])
    return dict(model=type(trainer.model).__name__, tokenizer=type(trainer.processing_class).__name__,
                train=len(trainer.train_dataset), eval=len(trainer.eval_dataset),
                optimizer=type(trainer.optimizer.optimizer
                               if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer).__name__,
                rate=trainer.lr_scheduler.get_last_lr()[0], main=trainer.accelerator.is_main_process,
                zero=trainer.is_world_process_zero(), local=trainer.is_local_process_zero(),
                steps=trainer.state.max_steps, world=trainer.args.world_size, device=trainer.accelerator.device.type,
                funcs=len(trainer.reward_funcs), names=trainer.reward_func_names,
                tokenizers=len(trainer.reward_processing_classes))

@script
def model_tags(kit): return dict(tagged=bool(kit.trainer().model.model_tags))


# Rewards

@script
def reward_model_by_name(kit):
    trainer = kit.train(kit.judge)
    return dict(keys={k for k in keys(trainer) if k.startswith("rewards/")})

@script
def reward_model_in_memory(kit):
    trainer = kit.train(AutoModelForSequenceClassification.from_pretrained(kit.judge),
                        reward_processing_classes=AutoTokenizer.from_pretrained(kit.judge))
    return dict(keys={k for k in keys(trainer) if k.startswith("rewards/")})

@script
def reward_model_scores(kit):
    calls = Calls()
    trainer = kit.train([kit.judge, calls], top_k=1, max_steps=1, reward_weights=[1, 0])
    return dict(reward=pytest.approx(logged(trainer, "reward")[0], abs=1e-4), same=calls.of("completions"))

@script
def reward_model_scores_chats(kit):
    trainer = kit.train(kit.judge, train_dataset=kit.data(CHATS), top_k=1, max_steps=1)
    return dict(reward=pytest.approx(logged(trainer, "reward")[0], abs=1e-4))

@script
def two_reward_models(kit):
    trainer = kit.train([kit.judge, str(kit.models/"judge2")], reward_weights=[.5, 2.])
    return dict(keys={k for k in keys(trainer) if k.startswith("rewards/")})

@script
def model_and_function(kit):
    trainer = kit.train([kit.judge, length])
    return dict(keys={k for k in keys(trainer) if k.startswith("rewards/")})

@script
def same_name_twice(kit):
    trainer = kit.train([length, length]) # RLOOTrainer logs both under one name
    return dict(steps=trainer.state.global_step, logged=any(k.startswith("rewards/length") for k in keys(trainer)))

@script
def lambda_partial_and_object(kit):
    def scaled(completions, by, **kwargs): return [by*len(c) for c in completions]
    trainer = kit.train([lambda completions, **kwargs: [1.]*len(completions), functools.partial(scaled, by=2.),
                         Calls()])
    return dict(keys={k for k in keys(trainer) if k.startswith("rewards/")})

@script
def reward_weights(kit):
    def one(completions, **kwargs): return [1.]*len(completions)
    def three(completions, **kwargs): return [3.]*len(completions)
    trainer = kit.train([one, three], reward_weights=[.5, 2.])
    last = trainer.state.log_history[0]
    return dict(reward=pytest.approx(6.5), got=last["reward"], std=last["reward_std"], one=last["rewards/one/mean"],
                three=last["rewards/three/mean"], three_std=last["rewards/three/std"],
                zero=last["frac_reward_zero_std"])

@script
def wrong_number_of_weights(kit): return dict(error=fails(kit.trainer, [length, reds], reward_weights=[1.]))

@script
def wrong_number_of_tokenizers(kit):
    return dict(error=fails(kit.trainer, [kit.judge, kit.judge],
                            reward_processing_classes=AutoTokenizer.from_pretrained(kit.judge)))

@script
def columns_of_the_data(kit):
    calls = Calls()
    kit.train(calls, train_dataset=kit.data(answer=list("abcdefgh"), score=list(range(8))))
    return dict(answers=calls.of("answer"), scores=calls.of("score"), prompts=calls.of("prompts"))

@script
def names_of_reward_arguments(kit):
    calls = Calls()
    kit.train(calls, train_dataset=kit.data(answer=list("abcdefgh")))
    return dict(names={*calls.seen[0]})

@script
def remove_unused_columns(kit):
    calls = Calls()
    kit.train(calls, train_dataset=kit.data(answer=list("abcdefgh")), remove_unused_columns=True)
    return dict(names={n for n in calls.seen[0] if n != "answer"}, column="answer" in calls.seen[0])

@script
def trainer_state_in_a_reward(kit):
    steps = []
    def reward(completions, trainer_state, **kwargs):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        return length(completions)
    kit.train(reward, max_steps=3)
    return dict(steps=steps)

@script
def completion_ids(kit):
    calls = Calls()
    trainer = kit.train(calls, generation_kwargs=dict(suppress_tokens=list(range(2, 17))))
    ids = [row for call in calls.of("completion_ids") for row in call]
    text = [row for call in calls.of("completions") for row in call]
    decoded = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    ends = all(row.index(1) == len(row) - 1 for row in ids if 1 in row)
    return dict(kinds={type(row[0]).__name__ for row in ids}, longest=max(map(len, ids)), same=decoded == text,
                eos_is_kept=ends and any(1 in row for row in ids))

@script
def conversations(kit):
    calls = Calls(lambda completions, **kwargs: [float(len(c[0]["content"])) for c in completions])
    kit.train(calls, train_dataset=kit.data(CHATS))
    reply = calls.of("completions")[0][0]
    return dict(prompts=calls.of("prompts"), shape=(len(reply), {*reply[0]}, reply[0]["role"]))

@script
def system_turns(kit):
    chats = [[dict(role="system", content="gold"), *chat] for chat in CHATS]
    calls = Calls()
    trainer = kit.train(calls, train_dataset=kit.data(chats), max_steps=1)
    used = trainer.state.num_input_tokens_seen - sum(map(len, calls.of("completion_ids")[0]))
    return dict(prompts=calls.of("prompts"), prompt_tokens=used)

@script
def chat_template_kwargs(kit):
    used = {}
    for calm in (False, True):
        calls = Calls()
        trainer = kit.train(calls, train_dataset=kit.data(CHATS), chat_template_kwargs=dict(calm=calm), max_steps=1)
        used[calm] = trainer.state.num_input_tokens_seen - sum(map(len, calls.of("completion_ids")[0]))
    return dict(prompt_tokens=used)

@script
def async_reward(kit):
    async def later(completions, **kwargs):
        await asyncio.sleep(.01)
        return length(completions)
    return dict(keys={k for k in keys(kit.train([later, length])) if k.startswith("rewards/")})

@script
def async_rewards_wait_together(kit):
    times = []
    async def first(completions, **kwargs):
        times.append(time.perf_counter())
        await asyncio.sleep(.1)
        times.append(time.perf_counter())
        return length(completions)
    async def second(completions, **kwargs): return await first(completions)
    kit.train([first, second], max_steps=1)
    return dict(both_begin_before_one_ends=len(times) == 4 and times[1] - times[0] < .1)

@script
def a_semaphore_lasts(kit):
    made = []
    async def limited(completions, **kwargs):
        if not made: made.append(asyncio.Semaphore(1))
        async with made[0]: await asyncio.sleep(.001)
        return length(completions)
    return dict(steps=kit.train(limited, max_steps=3).state.global_step)

@script
def log_extra_and_metric(kit):
    def reward(completions, log_extra, log_metric, **kwargs):
        log_extra("first", [c[:3] for c in completions])
        log_metric("accuracy", .75)
        return length(completions)
    trainer = kit.train(reward, eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="steps", eval_steps=1,
                        log_completions=True)
    return dict(values=logged(trainer, "accuracy"), eval=logged(trainer, "eval_accuracy"))

@script
def none_where_it_does_not_apply(kit):
    def even(completions, **kwargs): return [1. if i % 2 else None for i in range(len(completions))]
    def never(completions, **kwargs): return [None]*len(completions)
    entry = kit.train([even, never, lambda completions, **kwargs: [2.]*len(completions)]).state.log_history[0]
    return dict(even=entry["rewards/even/mean"], never=entry.get("rewards/never/mean"),
                reward=pytest.approx(entry["reward"]))

@script
def all_none_warns(kit):
    def never(completions, **kwargs): return [None]*len(completions)
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("trl.trainer.rloo_trainer", "rlhf_nb")]
    for logger in loggers: logger.addHandler(handler)
    trainer = kit.train(never)
    for logger in loggers: logger.removeHandler(handler)
    return dict(said=any("None" in text for text in said), steps=trainer.state.global_step,
                reward=[x for x in logged(trainer, "reward") if x is not None])

@script
def all_none_for_some_rows(kit):
    def some(completions, **kwargs): return [None if i % 4 == 0 else 1. for i in range(len(completions))]
    entry = kit.train(some).state.log_history[0]
    return dict(reward=entry["reward"], std=entry["reward_std"])

@script
def nan_is_none(kit):
    def some(completions, **kwargs): return [float("nan") if i % 4 == 0 else 1. for i in range(len(completions))]
    entry = kit.train(some).state.log_history[0]
    return dict(reward=entry["reward"], std=entry["reward_std"])

@script
def kinds_of_numbers(kit):
    kinds = [lambda completions, **kwargs: torch.ones(len(completions)), lambda completions,
             **kwargs: np.ones(len(completions)), lambda completions, **kwargs: [1]*len(completions),
             lambda completions, **kwargs: [True]*len(completions)]
    return dict(reward=kit.train(kinds).state.log_history[0]["reward"])

@script
def wrong_number_of_rewards(kit): return dict(fails=bool(fails(kit.train, lambda completions, **kwargs: [1.])))

@script
def errors_in_rewards(kit):
    def broken(completions, **kwargs): raise KeyError("answer")
    async def later(completions, **kwargs): raise KeyError("answer")
    found = []
    for reward in (broken, later):
        with pytest.raises(Exception) as error: kit.train(reward)
        found.append("answer" in str(error.value))
    return dict(names_the_cause=found)

@script
def reward_clip_range(kit):
    trainer = kit.train(lambda completions, **kwargs: [9.]*len(completions), reward_clip_range=(-1, 1))
    return dict(steps=trainer.state.global_step, clipped=tuple(trainer.args.reward_clip_range))


# Prompts, generation, batches

@script
def groups_are_neighbours(kit):
    calls = Calls()
    kit.train(calls, num_generations=4, per_device_train_batch_size=8)
    return dict(prompts=calls.of("prompts"))

@script
def num_generations_does_not_divide(kit): return dict(error=fails(kit.args, num_generations=3))

@script
def gradient_accumulation(kit):
    calls = Calls()
    trainer = kit.train(calls, gradient_accumulation_steps=2)
    return dict(prompts=calls.of("prompts"), steps=trainer.state.global_step)

@script
def steps_per_generation(kit):
    calls = Calls()
    kit.train(calls, steps_per_generation=2, num_train_epochs=1, max_steps=-1)
    return dict(prompts=calls.of("prompts"))

@script
def generation_batch_size(kit):
    calls = Calls()
    trainer = kit.train(calls, generation_batch_size=8, num_train_epochs=1, max_steps=-1)
    return dict(prompts=calls.of("prompts"), steps=trainer.args.steps_per_generation)

@script
def num_iterations(kit):
    calls = Calls()
    kit.train(calls, num_iterations=2, num_train_epochs=1, max_steps=-1)
    return dict(prompts=calls.of("prompts"))

@script
def epochs(kit):
    trainer = kit.train(num_train_epochs=2, max_steps=-1)
    return dict(steps=trainer.state.global_step, total=trainer.state.max_steps, epochs=trainer.state.num_train_epochs,
                epoch=logged(trainer, "epoch"))

@script
def half_an_epoch(kit):
    trainer = kit.train(num_train_epochs=.5, max_steps=-1)
    return dict(steps=trainer.state.global_step, epoch=pytest.approx(trainer.state.epoch))

@script
def max_steps_beyond_an_epoch(kit):
    calls = Calls()
    trainer = kit.train(calls, max_steps=6)
    return dict(prompts=calls.of("prompts"), epoch=logged(trainer, "epoch"))

@script
def shuffled_prompts(kit):
    calls = Calls()
    kit.train(calls, shuffle_dataset=True, num_train_epochs=1, max_steps=-1)
    rows = [p for call in calls.of("prompts") for p in call]
    return dict(all=sorted(rows), in_order=rows == sorted(rows))

@script
def stream(kit):
    calls = Calls()
    trainer = kit.train(calls, train_dataset=kit.data().to_iterable_dataset(), max_steps=3)
    return dict(prompts=calls.of("prompts"), steps=trainer.state.global_step)

@script
def stream_without_max_steps(kit):
    return dict(error=fails(kit.train, train_dataset=kit.data().to_iterable_dataset(), max_steps=-1))

@script
def stream_for_evaluation(kit):
    trainer = kit.trainer(eval_dataset=kit.data(PROMPTS[:2]).to_iterable_dataset())
    return dict(keys={*trainer.evaluate()} & {"eval_reward"})

@script
def greedy_by_top_k(kit):
    calls = Calls()
    kit.train(calls, top_k=1)
    return dict(completions=calls.of("completions")[0])

@script
def greedy_by_top_p(kit):
    calls = Calls()
    kit.train(calls, top_p=1e-6)
    return dict(completions=calls.of("completions")[0])

@script
def greedy_by_min_p(kit):
    calls = Calls()
    kit.train(calls, min_p=1.)
    return dict(completions=calls.of("completions")[0])

@script
def greedy_by_temperature(kit):
    calls = Calls()
    kit.train(calls, temperature=1e-4)
    return dict(completions=calls.of("completions")[0])

@script
def repetition_penalty(kit):
    calls = Calls()
    kit.train(calls, repetition_penalty=100., top_k=1)
    return dict(completions=calls.of("completions")[0])

@script
def generation_kwargs(kit):
    calls = Calls()
    kit.train(calls, generation_kwargs=dict(suppress_tokens=[1, *range(9, 19)]))
    rows = [ids for call in calls.of("completion_ids") for ids in call]
    return dict(tokens={t for ids in rows for t in ids} <= {0, 1, 2, 3, 4, 5, 6, 7, 8},
                lengths={len(ids) for ids in rows})

@script
def generation_kwargs_overrule(kit):
    calls = Calls()
    kit.train(calls, top_k=5, generation_kwargs=dict(top_k=1))
    return dict(completions=calls.of("completions")[0])

@script
def max_completion_length(kit):
    calls = Calls()
    trainer = kit.train(calls, max_completion_length=1)
    return dict(lengths={len(ids) for call in calls.of("completion_ids") for ids in call},
                logged=logged(trainer, "completions/max_length"))

@script
def generation_config_of_the_model(kit):
    model = AutoModelForCausalLM.from_pretrained(kit.policy)
    model.generation_config.top_k, model.generation_config.max_length = 1, 3
    calls = Calls()
    kit.train(calls, model=model, temperature=5., max_completion_length=6)
    rows = [ids for call in calls.of("completion_ids") for ids in call]
    return dict(longest=max(map(len, rows)), kinds=len({tuple(ids) for ids in rows}) > 4)

@script
def mask_truncated_completions(kit):
    trainer = kit.trainer(mask_truncated_completions=True, generation_kwargs=dict(suppress_tokens=[0, 1]))
    before = weights(trainer.model)
    trainer.train()
    return dict(moved=moved(trainer, before), clipped=logged(trainer, "completions/clipped_ratio"))

@script
def lengths_in_the_log(kit):
    calls = Calls()
    trainer = kit.train(calls, max_steps=1)
    rows = calls.of("completion_ids")[0]
    ended = [len(r) for r in rows if r[-1] == 1]
    entry = trainer.state.log_history[0]
    def near(key, value): return entry[f"completions/{key}"] == pytest.approx(value)
    return dict(mean=near("mean_length", np.mean([len(r) for r in rows])),
                least=near("min_length", min(map(len, rows))), most=near("max_length", max(map(len, rows))),
                clipped=near("clipped_ratio", 1 - len(ended)/len(rows)),
                ended=near("mean_terminated_length", np.mean(ended or [0])),
                tokens=entry["num_tokens"] == trainer.state.num_input_tokens_seen)


# What is trained

@script
def weights_move(kit):
    trainer = kit.trainer()
    before = weights(trainer.model)
    trainer.train()
    return dict(moved=moved(trainer, before))

@script
def no_learning_rate_no_change(kit):
    trainer = kit.trainer(learning_rate=0., weight_decay=.1)
    before = weights(trainer.model)
    trainer.train()
    return dict(moved=len(moved(trainer, before)))

@script
def lora(kit):
    trainer = kit.trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = weights(trainer.model)
    trainer.train()
    return dict(model=isinstance(trainer.model, PeftModel), moved={n for n in moved(trainer, before) if "lora_B" in n},
                base={n for n in moved(trainer, before) if "lora" not in n} == set())

@script
def lora_all_linear(kit):
    return dict(steps=kit.train(peft_config=LoraConfig(r=2, target_modules="all-linear",
                                                       task_type="CAUSAL_LM")).state.global_step)

@script
def lora_with_a_module_to_save(kit):
    trainer = kit.trainer(peft_config=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]))
    before = weights(trainer.model)
    trainer.train()
    return dict(embedding=any("modules_to_save" in n for n in moved(trainer, before)))

@script
def dora(kit):
    return dict(steps=kit.train(peft_config=LoraConfig(r=2, target_modules=["q_proj"],
                                                       use_dora=True)).state.global_step)

@script
def peft_model(kit):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(kit.policy), LoraConfig(r=2, target_modules=["q_proj"]))
    trainer = kit.trainer(model=model)
    before = weights(trainer.model)
    trainer.train()
    return dict(moved={n for n in moved(trainer, before) if "lora_B.default" in n},
                first_kl=pytest.approx(logged(trainer, "kl")[0], abs=1e-6))

@script
def peft_model_and_config(kit):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(kit.policy), LoraConfig(r=2, target_modules=["q_proj"]))
    return dict(error=fails(kit.trainer, model=model, peft_config=LoraConfig()))

@script
def get_peft_config_of_trl(kit):
    config = get_peft_config(ModelConfig(use_peft=True, lora_r=2, lora_alpha=4,
                                         lora_target_modules=["q_proj", "v_proj"]))
    trainer = kit.trainer(peft_config=config)
    return dict(rank=trainer.model.peft_config["default"].r, alpha=trainer.model.peft_config["default"].lora_alpha,
                modules=trainer.model.peft_config["default"].target_modules,
                none=get_peft_config(ModelConfig(use_peft=False)))

@script
def frozen_stays_frozen(kit):
    model = AutoModelForCausalLM.from_pretrained(kit.policy)
    model.model.embed_tokens.weight.requires_grad_(False)
    trainer = kit.trainer(model=model)
    before = weights(trainer.model)
    trainer.train()
    return dict(embedding="model.embed_tokens.weight" in moved(trainer, before),
                head="model.norm.weight" in moved(trainer, before))

@script
def gradient_checkpointing(kit): return dict(steps=kit.train(gradient_checkpointing=True).state.global_step)

@script
def disable_dropout(kit):
    trainer = kit.trainer(model=str(kit.models/"gpt2"), disable_dropout=True)
    return dict(rates={m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)})

@script
def sync_ref_model(kit):
    trainer = kit.trainer(sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1., learning_rate=.1)
    before = weights(trainer.ref_model)
    trainer.train()
    after = weights(trainer.ref_model)
    return dict(changed={n for n in before if not torch.equal(before[n], after[n])},
                like_policy=all(torch.allclose(p, after[n]) for n, p in trainer.model.named_parameters()))

@script
def beta_is_zero(kit):
    trainer = kit.train(beta=0.)
    return dict(reference=trainer.ref_model, kl=logged(trainer, "kl"), steps=trainer.state.global_step)

@script
def first_kl_is_zero(kit): return dict(kl=pytest.approx(logged(kit.train(), "kl")[0], abs=1e-6))

@script
def reference_of_the_trainer(kit):
    trainer = kit.train(learning_rate=.1)
    start = AutoModelForCausalLM.from_pretrained(kit.policy)
    return dict(unchanged=all(torch.equal(p, start.get_parameter(n)) for n, p in trainer.ref_model.named_parameters()),
                lora=kit.trainer(peft_config=LoraConfig(target_modules=["q_proj"])).ref_model)

@script
def experts(kit):
    trainer = kit.train(model=str(kit.models/"experts"), router_aux_loss_coef=.5)
    return dict(logged=len(logged(trainer, "aux_loss")))

@script
def experts_without_aux_loss(kit):
    return dict(logged=len(logged(kit.train(model=str(kit.models/"experts"), router_aux_loss_coef=0.), "aux_loss")))

@script
def aux_loss_of_a_dense_model(kit): return dict(error=fails(kit.trainer, router_aux_loss_coef=.5))

@script
def normalize_advantages(kit): return dict(steps=kit.train(normalize_advantages=True).state.global_step)

@script
def epsilon_high(kit): return dict(steps=kit.train(epsilon=.1, epsilon_high=.3).state.global_step)

@script
def same_seed_same_run(kit):
    runs = []
    for seed in (1, 1, 2):
        calls = Calls()
        kit.train(calls, seed=seed, shuffle_dataset=True)
        runs.append(calls.of("completions"))
    return dict(same=runs[0] == runs[1], other=runs[0] == runs[2])


# Optimizer and schedule

def _optimizer(trainer): return getattr(trainer.optimizer, "optimizer", trainer.optimizer)

@script
def names_of_optimizers(kit):
    found = {}
    for name in ("sgd", "adafactor", "rmsprop"):
        found[name] = type(_optimizer(kit.train(optim=name, max_steps=1))).__name__
    return found

@script
def optim_args(kit):
    optimizer = _optimizer(kit.train(optim="rmsprop", optim_args="momentum=0.5", max_steps=1))
    return dict(momentum=optimizer.param_groups[0]["momentum"])

@script
def own_optimizer(kit):
    model = AutoModelForCausalLM.from_pretrained(kit.policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=.5)
    trainer = kit.trainer(model=model, optimizers=(optimizer, None))
    before = weights(trainer.model)
    trainer.train()
    return dict(moved=moved(trainer, before), same=_optimizer(trainer) is optimizer,
                rates=logged(trainer, "learning_rate"))

@script
def own_optimizer_and_schedule(kit):
    model = AutoModelForCausalLM.from_pretrained(kit.policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1/(1 + step))
    return dict(rates=logged(kit.train(model=model, optimizers=(optimizer, schedule), max_steps=3), "learning_rate"))

@script
def learning_rates(kit):
    rates = {}
    for name, more in dict(cosine={}, constant_with_warmup=dict(warmup_steps=2),
                           polynomial=dict(lr_scheduler_kwargs=dict(power=2.))).items():
        rates[name] = logged(kit.train(lr_scheduler_type=name, max_steps=3, **more), "learning_rate")
    return rates

@script
def warmup_as_a_share(kit): return dict(rates=logged(kit.train(warmup_steps=.5, max_steps=4), "learning_rate"))

@script
def adam_settings(kit):
    group = _optimizer(kit.train(adam_beta1=.8, adam_beta2=.95, adam_epsilon=1e-6, weight_decay=.1,
                                 max_steps=1)).param_groups[0]
    return dict(betas=tuple(group["betas"]), eps=group["eps"], decay=group["weight_decay"])

@script
def no_decay_of_norms(kit):
    trainer = kit.train(weight_decay=.1, max_steps=1)
    decays = {id(p): g["weight_decay"] for g in _optimizer(trainer).param_groups for p in g["params"]}
    return {n: decays[id(p)] for n, p in trainer.model.named_parameters()}

@script
def gradient_norm_without_limit(kit):
    norms = logged(kit.train(max_grad_norm=0, learning_rate=.1), "grad_norm")
    return dict(numbers=all(isinstance(n, float) for n in norms), logged=len(norms))


# Callbacks and events

@script
def events_of_a_run(kit):
    events = Events()
    kit.train(callbacks=[events])
    return dict(events=events.seen)

@script
def events_with_evaluation_and_checkpoints(kit):
    events = Events()
    kit.train(callbacks=[events], eval_dataset=kit.data(PROMPTS[:4]), eval_strategy="steps", eval_steps=1,
              save_strategy="steps", save_steps=2, num_train_epochs=1, max_steps=-1)
    return dict(events=events.seen)

@script
def events_by_epoch(kit):
    events = Events()
    kit.train(callbacks=[events], eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="epoch", save_strategy="epoch",
              logging_strategy="epoch", num_train_epochs=2, max_steps=-1)
    return dict(events=[e for e in events.seen if e not in ("on_prediction_step",)])

@script
def callback_class(kit):
    out = io.StringIO()
    with contextlib.redirect_stdout(out): kit.train(callbacks=[PrinterCallback])
    return dict(printed="reward" in out.getvalue())

@script
def callbacks_come_and_go(kit):
    trainer = kit.trainer(callbacks=[PrinterCallback])
    events = Events()
    trainer.add_callback(events)
    gone = trainer.pop_callback(PrinterCallback)
    trainer.remove_callback(events)
    trainer.add_callback(Events)
    trainer.train()
    return dict(gone=type(gone).__name__, seen=events.seen,
                there=any(isinstance(c, Events) for c in trainer.callback_handler.callbacks))

@script
def what_callbacks_are_given(kit):
    given = {}
    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): given.update(kwargs)
        def on_evaluate(self, args, state, control, metrics, **kwargs): given["metrics"] = metrics
        def on_log(self, args, state, control, logs, **kwargs): given["logs"] = logs
    kit.train(callbacks=[Look()], eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="steps", eval_steps=1)
    return dict(names={*given}, model=type(given["model"]).__name__, tokenizer=type(given["processing_class"]).__name__,
                optimizer=hasattr(given["optimizer"], "param_groups"),
                metrics={*given["metrics"]} & {"eval_reward", "eval_runtime"})

@script
def a_callback_stops_the_run(kit):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == 2
    trainer = kit.train(callbacks=[Stop()], max_steps=4)
    return dict(steps=trainer.state.global_step)

@script
def a_callback_asks_for_everything(kit):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2: control.should_log = control.should_evaluate = control.should_save = True
    trainer = kit.train(callbacks=[Ask()], eval_dataset=kit.data(PROMPTS[:2]), logging_strategy="no", max_steps=3)
    return dict(logged=[e["step"] for e in trainer.state.log_history if "reward" in e],
                evaluated=[e["step"] for e in trainer.state.log_history if "eval_reward" in e],
                saved=[p.name for p in kit.out.glob("checkpoint-*")])

@script
def a_callback_changes_the_log(kit):
    class Add(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs): logs["mine"] = 1.
    trainer = kit.train(callbacks=[Add()])
    return dict(mine=logged(trainer, "mine"))

@script
def callbacks_of_others(kit):
    trainer = kit.train(callbacks=[RichProgressCallback(), BEMACallback(update_freq=1)], save_strategy="steps",
                        save_steps=2)
    return dict(steps=trainer.state.global_step,
                bema={f for f in kit.files() if "bema" in f and f.endswith("safetensors")})

@script
def early_stopping(kit):
    def reward(completions, trainer_state, **kwargs): return [float(trainer_state.global_step == 2)]*len(completions)
    trainer = kit.train(reward, callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
                        eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="steps", eval_steps=1, save_strategy="steps",
                        save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_reward",
                        greater_is_better=True, max_steps=6)
    return dict(steps=trainer.state.global_step, best=trainer.state.best_metric,
                at=Path(trainer.state.best_model_checkpoint).name, step=trainer.state.best_global_step)

@script
def load_best_model_at_end(kit):
    def reward(completions, trainer_state, **kwargs): return [float(-trainer_state.global_step)]*len(completions)
    trainer = kit.train(reward, eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="steps", eval_steps=1,
                        save_strategy="steps", save_steps=1, load_best_model_at_end=True,
                        metric_for_best_model="reward", max_steps=3, learning_rate=.1)
    saved = AutoModelForCausalLM.from_pretrained(kit.out/"checkpoint-1")
    return dict(best=trainer.state.best_metric,
                like_first=all(torch.allclose(p, saved.get_parameter(n)) for n, p in trainer.model.named_parameters()))


# Logs

# A PPO update has no loss in evaluation, and no batches of which to name the extremes
NOT_HERE = {"total_flos", "clip_ratio/low_min", "clip_ratio/high_max", "eval_loss"}
NOT_HERE |= {f"eval_clip_ratio/{name}" for name in ("low_min", "low_mean", "high_max", "high_mean", "region_mean")}

@script
def log_keys(kit): return dict(keys=keys(kit.train([length, reds])) - NOT_HERE)

@script
def eval_log_keys(kit):
    trainer = kit.train(eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="steps", eval_steps=1)
    return dict(keys={k for k in keys(trainer) if k.startswith("eval_")} - NOT_HERE)

@script
def last_entry(kit):
    trainer = kit.train()
    last = trainer.state.log_history[-1]
    return dict(keys={*last} - NOT_HERE, number=isinstance(last["train_loss"], float))

@script
def train_output(kit):
    output = kit.trainer().train()
    return dict(kind=type(output).__name__, step=output.global_step, loss=isinstance(output.training_loss, float),
                keys={*output.metrics} - NOT_HERE)

@script
def logging_steps_as_a_share(kit):
    return dict(steps=[e["step"] for e in kit.train(logging_steps=.5, max_steps=4).state.log_history if "reward" in e
                       and "train_loss" not in e])

@script
def logging_first_step(kit):
    return dict(steps=[e["step"]
                       for e in kit.train(logging_steps=3, logging_first_step=True, max_steps=4).state.log_history
                       if "train_loss" not in e])

@script
def no_logging(kit):
    return dict(entries=["train_loss" in e for e in kit.train(logging_strategy="no").state.log_history])

@script
def logging_averages(kit):
    count = iter(range(100))
    def step(completions, **kwargs): return [float(next(count))]*len(completions)
    return dict(rewards=logged(kit.train(step, logging_steps=2, max_steps=5), "reward"))

@script
def log_history_is_json(kit):
    trainer = kit.train()
    return dict(text=isinstance(json.dumps(trainer.state.log_history), str))

@script
def tensorboard(kit):
    kit.train(report_to="tensorboard")
    return dict(files=any("tfevents" in f for f in kit.files()))

@script
def report_to_a_list(kit):
    return dict(report=kit.args(report_to=["tensorboard"]).report_to, none=kit.args(report_to=[]).report_to,
                text=kit.args(report_to="none").report_to)

@script
def run_name(kit): return dict(name=kit.trainer(run_name="first").args.run_name)

@script
def own_log_method(kit):
    class Mine(kit.Trainer):
        def log(self, logs, *more):
            logs["mine"] = 2.
            super().log(logs, *more)
    trainer = Mine(kit.policy, length, kit.args(), kit.data())
    trainer.train()
    return dict(mine=logged(trainer, "mine"))

@script
def log_completions(kit):
    trainer = kit.train(log_completions=True, num_completions_to_print=1, log_unique_prompts=True)
    return dict(steps=trainer.state.global_step)


# Evaluation

@script
def evaluate_returns_and_logs(kit):
    trainer = kit.trainer(eval_dataset=kit.data(PROMPTS[:3]))
    found = trainer.evaluate()
    return dict(keys={*found} - NOT_HERE, logged={*trainer.state.log_history[-1]} - NOT_HERE,
                number=isinstance(found["eval_runtime"], float))

@script
def evaluate_with_prefix(kit):
    trainer = kit.train(eval_dataset=kit.data(PROMPTS[:2]))
    found = trainer.evaluate(kit.data(PROMPTS[2:4]), metric_key_prefix="test")
    return dict(keys={k for k in found if k in ("test_runtime", "test_samples_per_second", "epoch")})

@script
def evaluate_scores(kit):
    calls = Calls()
    trainer = kit.trainer(calls, eval_dataset=kit.data(PROMPTS[:3]), num_generations_eval=1, top_k=1,
                          per_device_eval_batch_size=2)
    found = trainer.evaluate()
    rows = [(p, c) for call in calls.seen for p, c in zip(call["prompts"], call["completions"], strict=True)]
    return dict(rows=sorted({*rows}), prompts={p for p, _ in rows},
                near=bool(abs(found["eval_reward"] - np.mean([len(c) for _, c in rows])) < 3))

@script
def evaluation_sets_in_a_dict(kit):
    trainer = kit.train(eval_dataset=dict(a=kit.data(PROMPTS[:2]), b=kit.data(PROMPTS[2:4])), eval_strategy="steps",
                        eval_steps=1)
    return dict(keys={k for k in keys(trainer)
                      if k.startswith(("eval_a_", "eval_b_"))} - {f"eval_{s}_{k.removeprefix('eval_')}"
                                                                  for k in NOT_HERE for s in "ab"},
                result={*trainer.evaluate()} & {"eval_a_runtime", "eval_b_runtime"})

@script
def evaluation_sets_in_a_dataset_dict(kit):
    trainer = kit.train(eval_dataset=DatasetDict(a=kit.data(PROMPTS[:2]), b=kit.data(PROMPTS[2:4])),
                        eval_strategy="steps", eval_steps=1)
    return dict(keys=keys(trainer) & {"eval_a_runtime", "eval_b_runtime"})

@script
def eval_on_start_and_delay(kit):
    found = {}
    for name, more in dict(start=dict(eval_on_start=True), delay=dict(eval_delay=2),
                           share=dict(eval_steps=.5, max_steps=4)).items():
        trainer = kit.train(eval_dataset=kit.data(PROMPTS[:2]), **dict(eval_strategy="steps", eval_steps=1) | more)
        found[name] = [e["step"] for e in trainer.state.log_history if "eval_reward" in e]
    return found

@script
def num_generations_eval(kit):
    calls = Calls()
    kit.trainer(calls, eval_dataset=kit.data(PROMPTS[:2]), num_generations_eval=4).evaluate()
    return dict(prompts=[p for call in calls.of("prompts") for p in call])

@script
def evaluation_without_a_set(kit):
    return dict(error=fails(kit.trainer, eval_strategy="steps", eval_steps=1), evaluate=fails(kit.trainer().evaluate))

@script
def evaluation_changes_nothing(kit):
    runs = []
    for more in (dict(), dict(eval_strategy="steps", eval_steps=1)):
        trainer = kit.trainer(eval_dataset=kit.data(PROMPTS[:2]), **more)
        before = weights(trainer.model)
        trainer.evaluate()
        runs.append(moved(trainer, before))
    return dict(moved=runs, training=kit.trainer().model.training)


# Files

@script
def save_and_load(kit):
    trainer = kit.train()
    trainer.save_model()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(kit.out), AutoTokenizer.from_pretrained(kit.out)
    return dict(same=all(torch.equal(p, trainer.model.get_parameter(n)) for n, p in model.named_parameters()),
                tokens=len(tokenizer), files=kit.files() - {"training_args.bin"})

@script
def save_elsewhere(kit):
    trainer = kit.train(peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    trainer.save_model(str(kit.out/"best"))
    model = AutoPeftModelForCausalLM.from_pretrained(kit.out/"best")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"
    return dict(same=torch.equal(model.get_parameter(name), trainer.model.get_parameter(name)),
                files=kit.files("best") - {"training_args.bin"},
                base=model.peft_config["default"].base_model_name_or_path == kit.policy)

@script
def save_pretrained_of_the_model(kit):
    trainer = kit.train()
    trainer.model.save_pretrained(kit.out/"plain")
    again = AutoModelForCausalLM.from_pretrained(kit.out/"plain")
    return dict(same=all(torch.equal(p, trainer.model.get_parameter(n)) for n, p in again.named_parameters()))

@script
def generate_after_training(kit):
    trainer = kit.train(learning_rate=0.)
    inputs = trainer.processing_class(["red orange"], return_tensors="pt")
    return dict(ids=trainer.model.generate(**inputs, max_new_tokens=3, do_sample=False).tolist())

@script
def checkpoints(kit):
    found = {}
    for name, more in dict(share=dict(save_strategy="steps", save_steps=.5), epoch=dict(save_strategy="epoch"), no={},
                           limit=dict(save_strategy="steps", save_steps=1, save_total_limit=1)).items():
        kit.train(**dict(output_dir=kit.out/name) | more)
        found[name] = sorted(p.name for p in (kit.out/name).glob("checkpoint-*"))
    return found

@script
def save_strategy_best(kit):
    def reward(completions, trainer_state, **kwargs): return [float(trainer_state.global_step == 2)]*len(completions)
    kit.train(reward, save_strategy="best", metric_for_best_model="eval_reward", greater_is_better=True,
              eval_dataset=kit.data(PROMPTS[:2]), eval_strategy="steps", eval_steps=1, max_steps=3)
    return dict(checkpoints=sorted(p.name for p in kit.out.glob("checkpoint-*")))

@script
def a_checkpoint_is_a_model(kit):
    kit.train(save_strategy="steps", save_steps=2)
    model = AutoModelForCausalLM.from_pretrained(kit.out/"checkpoint-2")
    state = json.loads((kit.out/"checkpoint-2"/"trainer_state.json").read_text())
    return dict(model=type(model).__name__, tokens=len(AutoTokenizer.from_pretrained(kit.out/"checkpoint-2")),
                step=state["global_step"], entries=len(state["log_history"]))

@script
def resume(kit):
    kit.train(save_strategy="steps", save_steps=2)
    found = {}
    for name, where in dict(last=True, path=str(kit.out/"checkpoint-2")).items():
        calls = Calls()
        trainer = kit.trainer(calls, max_steps=4)
        trainer.train(resume_from_checkpoint=where)
        found[name] = (trainer.state.global_step,
                       [e["step"] for e in trainer.state.log_history if "train_loss" not in e], calls.of("prompts"))
    return found

@script
def resume_is_exact(kit):
    kit.train(save_strategy="steps", save_steps=2, max_steps=4, output_dir=kit.out/"a", lr_scheduler_type="constant")
    trainer = kit.trainer(max_steps=4, output_dir=kit.out/"b", lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=kit.out/"a"/"checkpoint-2")
    whole = AutoModelForCausalLM.from_pretrained(kit.out/"a"/"checkpoint-4")
    return dict(steps=trainer.state.global_step, keeps_adam=len(trainer.optimizer.state_dict()["state"]) > 0,
                names={n for n, _ in whole.named_parameters()})

@script
def resume_with_lora(kit):
    config = LoraConfig(r=2, target_modules=["q_proj"])
    kit.train(save_strategy="steps", save_steps=2, peft_config=config)
    trainer = kit.trainer(max_steps=3, peft_config=config)
    trainer.train(resume_from_checkpoint=True)
    return dict(steps=trainer.state.global_step)

@script
def resume_by_setting(kit):
    kit.train(save_strategy="steps", save_steps=2)
    args = kit.args(max_steps=3, resume_from_checkpoint=str(kit.out/"checkpoint-2"))
    trainer = kit.Trainer(kit.policy, length, args, kit.data())
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    return dict(steps=trainer.state.global_step, entries=len(trainer.state.log_history))

@script
def resume_from_nothing(kit): return dict(error=fails(kit.trainer().train, resume_from_checkpoint=True))

@script
def train_twice(kit):
    trainer = kit.train()
    trainer.args.max_steps = 4
    trainer.train()
    return dict(steps=trainer.state.global_step)

@script
def save_state_and_metrics(kit):
    trainer = kit.trainer()
    output = trainer.train()
    trainer.log_metrics("train", output.metrics)
    trainer.save_metrics("train", output.metrics)
    trainer.save_state()
    state = json.loads((kit.out/"trainer_state.json").read_text())
    return dict(files=kit.files() & {"train_results.json", "all_results.json", "trainer_state.json"},
                step=state["global_step"], keys={*json.loads((kit.out/"train_results.json").read_text())} - NOT_HERE)

@script
def model_card(kit):
    trainer = kit.train()
    trainer.create_model_card(model_name="my-model", dataset_name="my/data", tags=["mine"])
    text = (kit.out/"README.md").read_text()
    return dict(name="my-model" in text, data="my/data" in text, tag="mine" in text, library="trl" in text,
                front=text.startswith("---"))

@script
def push_to_hub(kit):
    sent = []
    class Repo:
        repo_id = "me/name"
    def upload(self, repo_id, folder_path, **kwargs):
        sent.append((repo_id, Path(folder_path, "README.md").read_text(),
                     {p.name for p in Path(folder_path).iterdir()}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", lambda self, repo_id, **kwargs: Repo())
        patch.setattr(HfApi, "upload_folder", upload)
        trainer = kit.train()
        trainer.push_to_hub(dataset_name="my/data")
    return dict(repositories={call[0] for call in sent}, card="my/data" in sent[-1][1],
                files=sent[-1][2] - {"training_args.bin"})

@script
def path_as_output_dir(kit):
    trainer = kit.train(output_dir=kit.out/"deep"/"er", save_strategy="steps", save_steps=1, max_steps=1)
    return dict(there=(kit.out/"deep"/"er"/"checkpoint-1").is_dir(), text=isinstance(trainer.args.output_dir, str))


# Command lines and configurations

@script
def trl_parser(kit):
    parser = TrlParser((ScriptArguments, kit.Config, ModelConfig))
    script, args, model = parser.parse_args_and_config(["--dataset_name", "my/data", "--output_dir", str(kit.out),
                                                        "--num_generations", "4", "--beta", "0.1", "--use_cpu",
                                                        "--bf16", "False", "--model_name_or_path", kit.policy,
                                                        "--use_peft", "--report_to", "none",
                                                        "--per_device_train_batch_size", "4"])
    return dict(data=script.dataset_name, generations=args.num_generations, beta=args.beta,
                model=model.model_name_or_path == kit.policy, peft=model.use_peft)

@script
def trl_parser_with_yaml(kit):
    file = kit.out/"config.yaml"
    file.write_text(yaml.safe_dump(dict(output_dir=str(kit.out), num_generations=4, per_device_train_batch_size=4,
                                        use_cpu=True, bf16=False, learning_rate=2e-6, reward_weights=[1., 2.],
                                        model_init_kwargs=dict(dtype="float32"), dataset_name="my/data")))
    script, args, _ = TrlParser((ScriptArguments, kit.Config, ModelConfig)).parse_args_and_config(["--config",
        str(file), "--beta", "0.2"])
    return dict(rate=args.learning_rate, weights=args.reward_weights, kwargs=args.model_init_kwargs, beta=args.beta,
                data=script.dataset_name)

@script
def hf_argument_parser(kit):
    args, = HfArgumentParser(kit.Config).parse_args_into_dataclasses(["--output_dir", str(kit.out), "--use_cpu",
                                                                      "--bf16", "False", "--max_completion_length", "7",
                                                                      "--generation_kwargs", '{"top_k": 3}'])
    return dict(length=args.max_completion_length, kwargs=args.generation_kwargs)

@script
def config_as_a_dict(kit):
    args = kit.args(beta=.3)
    same = kit.Config(**{k: v for k,
                         v in args.to_dict().items()
                         if k in ("output_dir", "beta", "use_cpu", "bf16", "num_generations")})
    return dict(beta=same.beta, text=json.loads(args.to_json_string())["beta"], dict=args.to_sanitized_dict()["beta"])

@script
def defaults_with_the_same_meaning(kit):
    args = kit.Config(str(kit.out), use_cpu=True, bf16=False)
    names = """
        learning_rate logging_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps
        max_completion_length temperature top_p top_k min_p repetition_penalty beta epsilon epsilon_high
        num_iterations reward_weights mask_truncated_completions sync_ref_model ref_model_mixup_alpha
        ref_model_sync_steps shuffle_dataset remove_unused_columns optim lr_scheduler_type max_grad_norm
        weight_decay seed save_steps save_strategy eval_strategy warmup_steps max_steps log_completions
        disable_dropout num_generations_eval use_vllm steps_per_generation generation_batch_size""".split()
    return {name: getattr(args, name) for name in names}

@script
def settings_that_do_not_go_together(kit):
    return dict(best=fails(kit.args, load_best_model_at_end=True, eval_strategy="no", save_strategy="steps"),
                both=fails(kit.args, generation_batch_size=8, steps_per_generation=3),
                steps=fails(kit.args, eval_strategy="steps", eval_steps=0))

@script
def half_precision_model(kit):
    trainer = kit.train(model=AutoModelForCausalLM.from_pretrained(kit.policy, dtype=torch.bfloat16))
    return dict(steps=trainer.state.global_step)

@script
def verbosity(kit):
    transformers.logging.set_verbosity_error()
    try: return dict(level=kit.trainer(log_level="error").args.get_process_log_level())
    finally: transformers.logging.set_verbosity_warning()


def same(mine, theirs):
    "Equal; a set holds at least what theirs holds."
    if isinstance(theirs, set): return theirs <= mine
    return mine == theirs or (mine != mine and theirs != theirs)


QUICK = [*SCRIPTS][::4] # The others take a minute more


@pytest.mark.parametrize("run", [
    pytest.param(run, id=name, marks=() if name in QUICK else pytest.mark.slow) for name, run in SCRIPTS.items()
])
def test_script(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {}
    for library, trainer, config in (("trl", RLOOTrainer, RLOOConfig), ("here", PPOTrainer, PPOConfig)):
        (tmp_path/library).mkdir()
        seen[library] = run(Kit(trainer, config, tmp_path/library))
    theirs, mine = seen["trl"], seen["here"]
    assert mine.keys() == theirs.keys()
    wrong = [f"{key}: {mine[key]!r} here, {theirs[key]!r} with RLOOTrainer" for key in theirs
             if not same(mine[key], theirs[key])]
    assert not wrong, "\n".join(wrong)
