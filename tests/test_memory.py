"Peak memory, each in a process of its own."
import subprocess
import sys

PEAK = """
import resource, sys, torch
from datasets import Dataset
from peft import LoraConfig
from rlhf_nb.config import PPOConfig
from rlhf_nb.rollout import Rollout
from rlhf_nb.tiny import tiny_policy
from rlhf_nb.trainer import PPOTrainer

def megabytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

settings = dict(output_dir=sys.argv[1], batch_size=8, mini_batch_size=8, num_ppo_epochs=1, torch_dtype="float32", log_with="none", disable_tqdm=True)
policy, tok = tiny_policy("bloom", hidden_size=128, n_layer=8)
reward = lambda prompts, **rest: [0.] * len(prompts)
trainer = PPOTrainer(policy, reward, PPOConfig(**settings, gradient_checkpointing=sys.argv[2] == "on"), processing_class=tok, peft_config=LoraConfig())
torch.manual_seed(0)
ids, ones, some = torch.randint(3, 900, (8, 256)), torch.ones(8, 256, dtype=torch.long), torch.zeros(8, 256)
answers = Rollout([{}] * 8, [""] * 8, [""] * 8, ids, ones, ids, ones, some, some, some, some, torch.ones(8, dtype=torch.bool))
before = megabytes()
trainer.step(answers, torch.randn(8))
print(megabytes() - before)
"""


def peak(folder, checkpointing):
    "Megabytes that an update adds."
    run = subprocess.run([sys.executable, "-c", PEAK, folder, checkpointing], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return float(run.stdout.split()[-1])


def test_gradient_checkpointing_lowers_the_peak(tmp_path):
    kept, recomputed = peak(tmp_path, "off"), peak(tmp_path, "on")
    assert recomputed < .6 * kept, (kept, recomputed)
