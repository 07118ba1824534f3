"""Time TRL's last PPOTrainer (1.12.0), in an environment of its own; the last line is JSON: peer.py MODELS SHAPE

It needs a reward model with the policy's tokenizer and a value model, so both are classifiers on the policy's
backbone: the configuration that its documentation shows."""
import argparse
import json
import tempfile
import time

import torch
from datasets import Dataset
from peak import peak_gb
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("models")
parser.add_argument("shape", type=json.loads)
parser.add_argument("--steps", type=int, default=3)
parser.add_argument("--dtype", default="bfloat16")
args = parser.parse_args()
s, dtype, path = args.shape, getattr(torch, args.dtype), f"{args.models}/policy"

tok = AutoTokenizer.from_pretrained(path, padding_side="left")
texts = [json.loads(line)["prompt"] for line in open(f"{args.models}/prompts.jsonl", encoding="utf-8")]
shape = dict(truncation=True, max_length=s["prompt"], padding="max_length")
data = Dataset.from_dict({"input_ids": [tok(text, **shape)["input_ids"] for text in texts]})
policy = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
reward, value = (AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=dtype) for _ in range(2))
reward.config.pad_token_id = value.config.pad_token_id = tok.pad_token_id


class Clock(TrainerCallback):
    seconds = []
    def on_train_begin(self, *args, **kwargs): self.last = time.perf_counter()
    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


with tempfile.TemporaryDirectory() as out:
    config = PPOConfig(
        output_dir=out,
        per_device_train_batch_size=s["batch"] // s["minibatches"],
        gradient_accumulation_steps=s["minibatches"],
        num_mini_batches=s["minibatches"],
        local_rollout_forward_batch_size=s["batch"],
        total_episodes=s["batch"] * args.steps,
        num_ppo_epochs=s["epochs"],
        learning_rate=1e-5,
        response_length=s["response"],
        temperature=1.,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
    )
    PPOTrainer(
        config,
        processing_class=tok,
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=value,
        train_dataset=data,
        callbacks=[Clock],
        peft_config=LoraConfig(r=8, lora_alpha=16, lora_dropout=.05, task_type="CAUSAL_LM"),
    ).train()
print(json.dumps(dict(seconds=Clock.seconds, peak_gb=peak_gb())))
