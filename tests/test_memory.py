"Peak memory, each in a process of its own."
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell a process's peak")

PEAK = """
import re, sys, torch
from pathlib import Path
from datasets import Dataset
from peft import LoraConfig
from transformers import BloomConfig, BloomForCausalLM
from rlhf_nb.config import PPOConfig
from rlhf_nb.models import Tokens
from rlhf_nb.rollout import Rollout
from rlhf_nb.testing import policy_tokenizer
from rlhf_nb.trainer import PPOTrainer

folder, (rows, tokens, layers, hidden, vocab, checkpointing) = sys.argv[1], map(int, sys.argv[2:])
policy = BloomForCausalLM(BloomConfig(n_layer=layers, n_head=4, hidden_size=hidden, vocab_size=vocab))
args = PPOConfig(output_dir=folder, per_device_train_batch_size=rows, use_cpu=True, bf16=False, report_to="none",
                 disable_tqdm=True,
                 gradient_checkpointing=bool(checkpointing))
trainer = PPOTrainer(policy, lambda prompts, **rest: [0.] * len(prompts), args,
                     Dataset.from_dict(dict(prompt=["Why?"] * rows)),
                     processing_class=policy_tokenizer(), peft_config=LoraConfig(target_modules=["query_key_value"]))
torch.manual_seed(0)
ids, ones = torch.randint(3, vocab, (rows, tokens)), torch.ones(rows, tokens, dtype=torch.long)
megabytes = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
before = megabytes()
tokens = Tokens(ids[:, :8], ones[:, :8], ids, ones)
with torch.no_grad(): out = trainer.policy(tokens, trainer.sampler.sampling, entropy=True)
rollout = Rollout([{}] * rows, [""] * rows, [""] * rows, tokens, *[out.logprobs] * 3,
                  out.values, out.entropy, ones[:, 0] > 0)
trainer.step(rollout, torch.randn(rows))
print(megabytes() - before)
"""


def peak(folder, **size):
    "Megabytes that scoring some completions and learning from them adds."
    run = subprocess.run([sys.executable, "-c", PEAK, folder, *map(str, size.values())], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(run.stdout.split()[-1])


@pytest.mark.slow
def test_gradient_checkpointing_lowers_the_peak(tmp_path):
    kept, recomputed = (
        peak(tmp_path, rows=8, tokens=256, layers=24, hidden=128, vocab=1000, checkpointing=on) for on in (0, 1)
    )
    assert recomputed < .6 * kept, (kept, recomputed)


@pytest.mark.slow
def test_memory_does_not_grow_with_completions_times_vocabulary(tmp_path):
    short, long = (
        peak(tmp_path, rows=4, tokens=n, layers=1, hidden=32, vocab=250_880, checkpointing=0) for n in (128, 512)
    )
    logits = 4 * (512 - 128) * 250_880 * 4 / 2**20
    assert long - short < .1 * logits, (short, long)
