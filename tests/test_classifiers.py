"""Every sequence classifier that transformers builds from a configuration, as a reward model: a score is a pair's own.

By default one of each kind; with --slow all.
"""
from copy import deepcopy

import pytest
from architectures import CLASSIFIERS, READS_PADDING, classifier

from rlhf_nb.rewards import RewardModel
from rlhf_nb.testing import policy_tokenizer, reward_tokenizer

QUICK = {*"bert roberta xlm-roberta deberta-v2 modernbert llama qwen3 gpt2 mpt funnel bart jamba".split()}
NEEDS_EOS = {"bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"} # They read the score there
QUESTIONS = ["What now?", "My son has had a cold for three days. " * 3, "Hi", "Tell me about it, please"]
ANSWERS = ["Rest.", "Drink water.", "Walk a little every day. " * 30, "No"]


@pytest.fixture(scope="module")
def tokenizers():
    "Both have another pad than the models' configurations; one writes pairs, the other plain text."
    return dict(pairs=reward_tokenizer(size=290), text=policy_tokenizer(size=290))


@pytest.mark.parametrize("kind", ["pairs", "text"])
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CLASSIFIERS
])
def test_a_score_does_not_depend_on_the_rest_of_the_batch(name, kind, tokenizers):
    if kind == "text" and name in NEEDS_EOS: pytest.skip("needs a tokenizer that writes EOS")
    tokenizer = deepcopy(tokenizers[kind])
    # As where a tokenizer does not know; Longformer's padding to whole windows takes positions, too
    tokenizer.model_max_length = 200 if name == "longformer" else 10 ** 30
    reward = RewardModel(classifier(name), tokenizer)
    together = reward(QUESTIONS, ANSWERS)
    alone = [reward([question], [answer])[0] for question, answer in zip(QUESTIONS, ANSWERS)]
    assert together == pytest.approx(alone, rel=1e-4, abs=1e-4)
    assert len({*together}) == 4 and (kind == "text" or reward.pads == (name not in READS_PADDING))
