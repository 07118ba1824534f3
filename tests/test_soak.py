"3,000 updates: memory and open files stay as they are, the log can be read."
import os
import re
from pathlib import Path

import pytest
from datasets import Dataset
from peft import LoraConfig
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback

from rlhf_nb.config import PPOConfig
from rlhf_nb.testing import tiny_policy
from rlhf_nb.trainer import PPOTrainer


class Watch(TrainerCallback):
    "Resident megabytes and open files, every 100 updates."
    def __init__(self): self.memory, self.files = [], []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % 100: return
        self.memory.append(int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
        self.files.append(len(os.listdir("/proc/self/fd")))


@pytest.mark.slow
def test_3000_updates(tmp_path):
    model, tok = tiny_policy("bloom", hidden_size=16, n_layer=1)
    watch, updates = Watch(), 3000
    args = PPOConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=updates,
        per_device_train_batch_size=2,
        max_completion_length=4,
        logging_steps=1,
        log_completions=True,
        save_steps=500,
        save_total_limit=2,
        report_to="tensorboard",
        bf16=False,
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        model,
        lambda completions, **columns: [float(len(c)) for c in completions],
        args,
        Dataset.from_dict({"prompt": list("abcdefgh")}),
        processing_class=tok,
        callbacks=[watch],
        peft_config=LoraConfig(r=2, target_modules=["query_key_value"]),
    )
    trainer.train()
    print(
        f"resident after 500 updates {watch.memory[4]:.0f} MB, after {updates} {watch.memory[-1]:.0f} MB;"
        f" open files {watch.files[4]}, {watch.files[-1]}"
    )
    assert max(watch.memory[5:]) < 1.05 * watch.memory[4] and watch.files[-1] <= watch.files[4]
    events = EventAccumulator(str(tmp_path/"run"/"trl"), size_guidance={"scalars": 0}).Reload()
    assert [e.step for e in events.Scalars("train/reward")] == list(range(1, updates + 1))
    assert sorted(p.name for p in (tmp_path/"run").glob("checkpoint-*")) == ["checkpoint-2500", "checkpoint-3000"]
