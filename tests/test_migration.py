"Names that others used for a setting are refused all at once, each with the name that it has here."
from dataclasses import fields

import pytest
from trl import RLOOConfig

from rlhf_nb import PPOConfig
from rlhf_nb.config import OLD_NAMES

KNOWN = {f.name for f in fields(PPOConfig)}
# What PPOConfig of this package had before
FIRST_VERSION = """
    batch_size cliprange cliprange_high gather_for_generation init_kl_coef log_with max_source_length
    max_target_length min_target_length mini_batch_size num_ppo_epochs rollout_batch_size score_clip
    torch_dtype""".split()
# PPOConfig of TRL 0.2x, without what it computes
TRL_LAST = """
    num_mini_batches total_episodes local_rollout_forward_batch_size num_sample_generations response_length
    stop_token temperature missing_eos_penalty sft_model_path batch_size mini_batch_size exp_name
    reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator
    cliprange vf_coef cliprange_value gamma lam ds3_gather_for_generation""".split()
# PPOConfig of TRL 0.11
TRL_FIRST = """
    steps learning_rate adap_kl_ctrl init_kl_coef kl_penalty target horizon gamma lam cliprange cliprange_value
    vf_coef batch_size mini_batch_size ppo_epochs gradient_accumulation_steps max_grad_norm early_stopping
    target_kl use_score_scaling use_score_norm score_clip whiten_rewards log_with model_name
    tracker_project_name seed""".split()


def test_settings_of_rloo_are_here():
    assert {f.name for f in fields(RLOOConfig)} <= KNOWN


@pytest.mark.parametrize("names", [FIRST_VERSION, TRL_LAST, TRL_FIRST],
                         ids=["first version", "TRL's last PPOConfig", "TRL's first PPOConfig"])
def test_old_settings_are_told_by_their_names_here(names, tmp_path):
    old = [name for name in names if name not in KNOWN]
    with pytest.raises(TypeError) as error: PPOConfig(str(tmp_path), **{name: 1 for name in old})
    said = str(error.value)
    for name in old: assert f"{name} is {OLD_NAMES[name]} here" in said
    assert "\n" not in said


@pytest.mark.parametrize("name", OLD_NAMES)
def test_what_old_names_lead_to_is_there(name):
    assert name not in KNOWN
    first = OLD_NAMES[name].split()[0].rstrip(",:=")
    arguments = {"processing_class", "reward_funcs", "model", "peft_config"} # Of PPOTrainer
    assert first in KNOWN | arguments | {"the", "nothing"}
