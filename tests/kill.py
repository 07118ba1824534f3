"""Kill a small run with SIGKILL again and again, resume it each time, and compare: kill.py FOLDER KILLS SEED"""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file

from rlhf_nb.checkpoint import checkpoints, damage, read_state
from rlhf_nb.config import PPOConfig
from rlhf_nb.testing import tiny_policy
from rlhf_nb.trainer import PPOTrainer

torch.set_num_threads(1)
UPDATES = 24


def length(completions, **columns): return [float(len(c)) for c in completions]


def train(out: Path):
    model, tok = tiny_policy("llama")
    args = PPOConfig(
        output_dir=str(out),
        max_steps=UPDATES,
        per_device_train_batch_size=2,
        steps_per_generation=2,
        num_iterations=2,
        max_completion_length=8,
        temperature=0.9,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        warmup_steps=3,
        use_score_scaling=True,
        use_score_norm=True,
        beta=0.2,
        adap_kl_ctrl=True,
        adap_kl_horizon=50,
        critic="adapter",
        save_steps=2,
        save_total_limit=3,
        logging_steps=3,
        log_completions=True,
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        overwrite_output_dir=True,
    )
    prompts = Dataset.from_dict({"prompt": [f"Question {i}?" for i in range(10)]})
    trainer = PPOTrainer(
        model,
        length,
        args,
        prompts,
        processing_class=tok,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train(resume_from_checkpoint=any(damage(p) is None for p in checkpoints(out)))


def child(out: Path) -> int: # Process id
    if pid := os.fork(): return pid
    os.dup2(os.open(out.parent/"log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    status = 1
    try: train(out); status = 0
    finally: os._exit(status)


def killed(pid: int, out: Path, rng: random.Random) -> bool: # False: it ended before
    "Kill at a random moment, or within a checkpoint's writing."
    writing, end = rng.random() < .5, time.monotonic() + rng.uniform(.2, 3)
    while time.monotonic() < end or writing:
        if os.waitpid(pid, os.WNOHANG)[0]: return ended(out)
        if writing and any(out.glob("tmp-checkpoint-*")): break
        time.sleep(.0005)
    if writing: time.sleep(rng.uniform(0, .03))
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1]) or ended(out)


def ended(out: Path) -> bool: # Always False
    assert (out/f"checkpoint-{UPDATES}").exists(), (out.parent/"log.txt").read_text()[-3000:]
    return False


def untimed(entry: dict) -> dict:
    return {
        k: v
        for k, v in entry.items()
        if not k.startswith("time/") and not k.endswith(("_time", "_runtime", "_per_second"))
    }


def result(out: Path):
    "All that must be equal, to the bit."
    folder = out/f"checkpoint-{UPDATES}"
    history = json.loads((folder/"trainer_state.json").read_text())["log_history"]
    weights = {
        str(p.relative_to(out)): load_file(p)
        for p in sorted(out.glob("**/*.safetensors"))
        if p.parent in (out, folder) or p.parent.parent in (out, folder)
    }
    state = read_state(folder)
    return dict(
        weights={k: v for k, v in weights.items() if "checkpoint-" not in k or f"checkpoint-{UPDATES}" in k},
        history=[*map(untimed, history)],
        state={k: v for k, v in state.items() if k != "pending"},
        pending=[*map(untimed, state["pending"])],
    )


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return a == b


if __name__ == "__main__":
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    rng, done, runs, writing = random.Random(seed), 0, 0, 0
    assert os.waitpid(child(folder/"straight"), 0)[1] == 0, (folder/"log.txt").read_text()[-3000:]
    want = result(folder/"straight")
    while done < kills:
        out = folder/f"run{runs}"
        while True:
            pid = child(out)
            if done < kills:
                if not killed(pid, out, rng): break
                done, writing = done + 1, writing + any(out.glob("tmp-checkpoint-*"))
            else:
                assert os.waitpid(pid, 0)[1] == 0, (folder/"log.txt").read_text()[-3000:]
                break
        got = result(out)
        assert same(got, want), [k for k in want if not same(got[k], want[k])]
        runs += 1
    print(json.dumps(dict(kills=done, while_writing=writing, runs=runs)))
