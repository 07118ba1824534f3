"""More of adapters: their plan, initialisations that read data, other names than "default", two in one model."""
import json

import pytest
import torch
from architectures import decoder, small
from datasets import Dataset
from kit import length
from peft import EvaConfig, LoftQConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from test_adapters import KINDS, LAYERS, NEEDS, REFUSED, config_of
from test_architectures import SAMPLING, alone, sample

from rlhf_nb.config import ModelArguments, PPOConfig
from rlhf_nb.memory import Device, plan
from rlhf_nb.models import load_policy, load_weights, merge, save_policy, with_adapter
from rlhf_nb.testing import policy_tokenizer, save_tiny
from rlhf_nb.trainer import PPOTrainer

pytestmark = pytest.mark.slow

CPU = Device("this machine", "cpu", 1e10, None, None, None, True)
IDS = torch.randint(5, 300, (8, 24), generator=torch.Generator().manual_seed(0))


WITHOUT_PLAN = {"FROD", "SHIRA", "UNILORA", "WAVEFT"} # Their shapes depend on values of weights


def settings(**more): return PPOConfig("unused", bf16=False, use_cpu=True, **more)


def models(base, reward, **more):
    return ModelArguments(model_name_or_path=str(base), reward_model_name_or_path=reward, use_peft=True, **more)


def short(**more):
    return PPOConfig("unused", per_device_train_batch_size=2, max_prompt_length=8, max_completion_length=8, **more)


@pytest.fixture(scope="module")
def reward(tmp_path_factory): return str(save_tiny(tmp_path_factory.mktemp("tiny"))[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    small("llama").save_pretrained(folder := tmp_path_factory.mktemp("base"))
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_the_plan_of_every_adapter(name, base, reward, tmp_path):
    "The command line makes LoRA alone; other kinds come by peft_path."
    if name in NEEDS: pytest.importorskip(NEEDS[name])
    config = config_of(name)
    config.save_pretrained(tmp_path)
    models_ = models(base, reward, peft_path=str(tmp_path))
    if name in REFUSED or name in WITHOUT_PLAN:
        with pytest.raises(ValueError): plan(models_, short(), CPU)
        return
    found = plan(models_, short(), CPU)
    policy = load_policy(decoder("llama"), settings(), None, config)
    assert found.parameters["trained"] == sum(p.numel() for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("more", [
    dict(use_dora=True), dict(use_rslora=True), dict(lora_target_modules=["all-linear"]),
    dict(lora_target_modules=["q_proj"]), dict(lora_modules_to_save=["lm_head"]),
    dict(lora_target_parameters=["mlp.down_proj.weight"]), dict(lora_r=64),
    dict(lora_dropout=.5),
], ids=str)
def test_the_plan_of_the_command_lines_adapters(more, base, reward):
    assert plan(models(base, reward, **more), short(), CPU).peak > 0


def corda(method="kpm"):
    lm = decoder("llama")
    config = LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM", init_lora_weights="corda",
                        corda_config=CordaConfig(corda_method=method))
    preprocess_corda(lm, config, run_model=lambda: [lm(input_ids=row[None]) for row in IDS.repeat(4, 1)])
    return get_peft_model(lm, config)


def eva():
    lm = get_peft_model(decoder("llama"), LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM",
                                                     init_lora_weights="eva", eva_config=EvaConfig(rho=1.)))
    rows = [dict(input_ids=IDS[i:i + 4], attention_mask=torch.ones_like(IDS[i:i + 4])) for i in (0, 4)] * 4
    initialize_lora_eva_weights(lm, rows, show_progress_bar=False)
    return lm


def loftq():
    return get_peft_model(decoder("llama"), LoraConfig(
        r=4, target_modules=LAYERS, task_type="CAUSAL_LM", init_lora_weights="loftq",
        loftq_config=LoftQConfig(loftq_bits=4)))


def simple(init):
    return lambda: get_peft_model(decoder("llama"), LoraConfig(
        r=4, target_modules=LAYERS, task_type="CAUSAL_LM", init_lora_weights=init))


PREPARED = dict(corda_kpm=corda, corda_ipm=lambda: corda("ipm"), eva=eva, loftq=loftq, pissa=simple("pissa"),
                pissa_niter=simple("pissa_niter_4"), olora=simple("olora"), mica=simple("mica"))
AS_BASE = {*PREPARED} - {"loftq"} # LoftQ starts beside the base


def prepared(name):
    torch.manual_seed(0)
    try: return PREPARED[name]()
    except ImportError as e: pytest.skip(str(e)) # LoftQ needs bitsandbytes


@pytest.mark.parametrize("name", PREPARED)
def test_a_model_that_peft_prepared(name, tmp_path):
    original = decoder("llama")
    lm = prepared(name)
    with torch.no_grad(): start = lm(input_ids=IDS).logits
    try: policy = load_policy(lm, settings(beta=.1))
    except ValueError as e:
        assert "init_lora_weights" in str(e)
        return
    tokens, found = sample(policy)
    mask = tokens.response_mask > 0
    if name in AS_BASE:
        assert (found["ref_logprobs"][mask] - torch.cat(alone(original, tokens))).abs().max() < 1e-4
    assert (found["ref_logprobs"] - found["logprobs"]).abs().max() < 1e-5
    with torch.no_grad():
        assert (policy.lm(input_ids=IDS).logits - start).abs().max() < 1e-5
        for p in policy.lm.parameters():
            if p.requires_grad: p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * .03)
        with policy.as_reference():
            assert (policy(tokens, SAMPLING).logprobs - found["ref_logprobs"])[mask].abs().max() < 1e-5
        now = policy(tokens, SAMPLING).logprobs[mask]
    save_policy(policy, tmp_path)
    try: fresh = with_adapter(decoder("llama"), str(tmp_path))
    except ValueError as e:
        assert "init_lora_weights" in str(e) or "corda" in str(e).lower()
        return
    assert (torch.cat(alone(fresh, tokens)) - now).abs().max() < 1e-4, "loaded onto the original base"
    assert (torch.cat(alone(merge(fresh), tokens)) - now).abs().max() < 1e-3


@pytest.mark.parametrize("name", sorted(AS_BASE))
def test_the_config_alone_of_such_an_adapter(name):
    "Without peft's preparation: the right numbers, or a line that names the setting."
    given = dict(corda_kpm=dict(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")),
                 corda_ipm=dict(init_lora_weights="corda", corda_config=CordaConfig(corda_method="ipm")),
                 eva=dict(init_lora_weights="eva", eva_config=EvaConfig()))
    config = LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM",
                        **given.get(name, dict(init_lora_weights=name.replace("niter", "niter_4"))))
    try: policy = load_policy(decoder("llama"), settings(beta=.1), None, config)
    except ValueError as e:
        assert "init_lora_weights" in str(e) or "LoraConfig" in str(e)
        return
    tokens, found = sample(policy)
    mask = tokens.response_mask > 0
    assert (found["ref_logprobs"][mask] - torch.cat(alone(decoder("llama"), tokens))).abs().max() < 1e-4


def saved(folder):
    tok = policy_tokenizer(size=290)
    decoder("llama").save_pretrained(folder)
    tok.save_pretrained(folder)
    return tok


def named(*names, active=None, init=True):
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM", init_lora_weights=init)
    lm = get_peft_model(decoder("llama"), config, adapter_name=names[0])
    for name in names[1:]: lm.add_adapter(name, config)
    lm.set_adapter(active or names[0])
    return lm


def trainer_of(lm, out, steps=2, **more):
    prompts = Dataset.from_dict(dict(prompt=[f"What about {i}?" for i in range(8)]))
    given = dict(per_device_train_batch_size=4, max_steps=steps, max_completion_length=8, learning_rate=1e-2,
                 lr_scheduler_type="constant", save_steps=1, report_to="none", disable_tqdm=True, bf16=False,
                 use_cpu=True, beta=.1) | more
    return PPOTrainer(lm, length, PPOConfig(str(out), **given), prompts, processing_class=policy_tokenizer(size=290))


CASES = {
    "mine": (["mine"], "mine"), "first of two": (["default", "other"], "default"),
    "second of two": (["default", "other"], "other"), "policy": (["policy"], "policy"),
    "a dash": (["my-adapter"], "my-adapter"), "q_proj": (["q_proj"], "q_proj"),
    "value_head": (["value_head"], "value_head"), "lm": (["lm"], "lm"),
    "critic": (["critic"], "critic"), "reference": (["reference"], "reference"),
    "beside a critic": (["default", "critic"], "default"), "beside a reference": (["default", "reference"], "default"),
}


@pytest.mark.parametrize("critic", ["shared", "adapter"])
@pytest.mark.parametrize("init", [True, False], ids=["neutral", "random"])
@pytest.mark.parametrize("case", CASES)
def test_adapters_of_other_names(case, init, critic, tmp_path):
    names, active = CASES[case]
    try: trainer = trainer_of(named(*names, active=active, init=init), tmp_path/"run", critic=critic)
    except ValueError as e:
        assert active in str(e) and "adapter" in str(e)
        return
    tokens, found = sample(trainer.policy)
    mask = tokens.response_mask > 0
    start = torch.cat(alone(named(*names, active=active, init=init), tokens))
    assert (found["ref_logprobs"][mask] - start).abs().max() < 1e-4
    others = {n: p.detach().clone() for n, p in trainer.policy.lm.named_parameters()
              if any(o in n.split(".") for o in {*names} - {active, "critic"})}
    trainer.train()
    now = dict(trainer.policy.lm.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in others.items() if n in now and "reference" not in n.split("."))
    with torch.no_grad():
        with trainer.policy.as_reference():
            assert (trainer.policy(tokens, SAMPLING).logprobs[mask] - start).abs().max() < 1e-4
        end = trainer.policy(tokens, SAMPLING)
    assert (end.logprobs[mask] - start).abs().max() > 1e-3
    trainer.save_model()
    assert (tmp_path/"run"/"adapter_config.json").exists()
    assert json.loads((tmp_path/"run"/"adapter_config.json").read_text())["r"] == 4
    fresh = with_adapter(decoder("llama"), str(tmp_path/"run"))
    assert isinstance(fresh, PeftModel)
    assert (torch.cat(alone(fresh, tokens)) - end.logprobs[mask]).abs().max() < 1e-4
    assert (torch.cat(alone(merge(fresh), tokens)) - end.logprobs[mask]).abs().max() < 1e-3
    again = trainer_of(named(*names, active=active, init=init), tmp_path/"run", critic=critic)
    again.train(resume_from_checkpoint=str(tmp_path/"run"/"checkpoint-1"))
    with torch.no_grad(): resumed = again.policy(tokens, SAMPLING)
    assert torch.equal(resumed.logprobs[mask], end.logprobs[mask])
    assert torch.equal(resumed.values[mask], end.values[mask])
    other = load_policy(named(*names, active=active, init=init), settings(beta=.1, critic=critic))
    load_weights(other, tmp_path/"run")
    with torch.no_grad(): loaded = other(tokens, SAMPLING)
    assert (loaded.logprobs[mask] - end.logprobs[mask]).abs().max() < 1e-5
    assert (loaded.values[mask] - end.values[mask]).abs().max() < 1e-5


def test_two_active_adapters_are_refused():
    lm = named("default", "other")
    lm.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="default, other: choose one"): load_policy(lm, settings())


@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_the_same_model_in_two_trainers_with_another_active_adapter(critic, tmp_path):
    lm = named("default", "other", init=False)
    trainer_of(lm, tmp_path/"one", 1, critic=critic).train()
    lm.set_adapter("other")
    trainer = trainer_of(lm, tmp_path/"two", 1, critic=critic)
    tokens, found = sample(trainer.policy)
    mask = tokens.response_mask > 0
    start = torch.cat(alone(named("default", "other", active="other", init=False), tokens))
    assert (found["ref_logprobs"][mask] - start).abs().max() < 1e-4
