"""Is a run that was resumed from a checkpoint equal, bit for bit, to the uninterrupted one? resume.py OUT.json"""
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from tempfile import mkdtemp

import torch
from datasets import Dataset
from found import Found, arguments, on_gpu
from models import SHAPES, make
from peft import LoraConfig
from torch import Tensor

from rlhf_nb.config import PPOConfig, has_bf16
from rlhf_nb.trainer import PPOTrainer

TYPES = dict(fp16=torch.float16, bf16=torch.bfloat16)
METRICS = "reward", "loss", "kl", "grad_norm"


def run(models: Path,
        folder: str,                 # Of the run
        dtype: str,                  # A key of `TYPES`
        updates: int,
        resume: Path | None = None,  # A checkpoint
) -> PPOTrainer:
    "Train on one GPU, with a checkpoint after half of the updates."
    s = SHAPES["tiny"]
    trainer = PPOTrainer(
        model=f"{models}/policy",
        reward_funcs=f"{models}/reward",
        args=PPOConfig(
            output_dir=folder,
            per_device_train_batch_size=s["batch"] // s["minibatches"],
            steps_per_generation=s["minibatches"],
            num_iterations=2,
            max_steps=updates,
            learning_rate=1e-3,
            max_prompt_length=s["prompt"],
            max_completion_length=s["response"],
            adap_kl_ctrl=True,
            use_score_scaling=True,
            fp16=dtype == "fp16",
            bf16=dtype == "bf16",
            save_steps=updates // 2,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_json(f"{models}/prompts.jsonl"),
        peft_config=LoraConfig(r=8, lora_alpha=16),
    )
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def weights(trainer: PPOTrainer) -> dict[str, Tensor]: # On the CPU, by name
    "What was trained."
    return {name: p.detach().cpu() for name, p in trainer.policy.named_parameters() if p.requires_grad}


def difference(one: PPOTrainer, two: PPOTrainer, last: int) -> str: # Empty: there is none
    "What is not the same in weights and in the metrics of the last updates."
    mine, other = weights(one), weights(two)
    apart = [name for name in mine if not torch.equal(mine[name], other[name])]
    told = [f"{name} of an update" for name in METRICS if one.history(name)[-last:] != two.history(name)[-last:]]
    if apart:
        most = max((mine[name] - other[name]).abs().max().item() for name in apart)
        told.append(f"{len(apart)} of {len(mine)} trained tensors, by at most {most:.1e}")
    return ", ".join(told)


def compare(models: Path, dtype: str, updates: int, work: Path) -> dict[str, str]: # Differences; empty: none
    "A run, the same again, and the first one resumed."
    folder = mkdtemp(dir=work)
    whole = run(models, folder, dtype, updates)
    again = run(models, mkdtemp(dir=work), dtype, updates)
    resumed = run(models, folder, dtype, updates, Path(folder)/f"checkpoint-{updates // 2}")
    last = updates - updates // 2
    return dict(resumed=difference(whole, resumed, last), again=difference(whole, again, updates))


def deterministic(args, dtype: str) -> str: # What was found, in words
    "The same comparison with PyTorch's deterministic algorithms, in a process of its own: cuBLAS reads a variable."
    out = args.out.with_name(f"resume_{dtype}.json")
    more = ["--quick"] if args.quick else []
    command = [sys.executable, __file__, out, "--work", args.work, "--deterministic", dtype, *more]
    env = os.environ | dict(CUBLAS_WORKSPACE_CONFIG=":4096:8")
    subprocess.run([*map(str, command)], env=env, check=True)
    told = json.loads(out.read_text())
    result = "equal" if not told["resumed"] else f"not equal ({told['resumed']})"
    operations = ", ".join(told["operations"]) or "none"
    return f"{result}; operations that have no deterministic form: {operations}"


def main_deterministic(args, models: Path, updates: int):
    "Compare with deterministic algorithms, and write which operations have none."
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        told = compare(models, args.deterministic, updates, args.work)
    texts = {str(w.message) for w in seen if "deterministic" in str(w.message)}
    operations = sorted({text.split(" does not have")[0][:80] for text in texts})
    args.out.write_text(json.dumps(told | dict(operations=operations)))


def main(found: Found, args, models: Path, updates: int):
    "Both types."
    equal = {}
    for dtype in TYPES:
        if dtype == "bf16" and on_gpu() and not has_bf16(torch.device("cuda")):
            found.note("bf16: this GPU has none")
            continue
        if not found.has(15, dtype): break
        with found.attempt(dtype):
            told = compare(models, dtype, updates, args.work)
            row = {"type": dtype, "updates": updates, "resumed is equal": not told["resumed"],
                   "difference": told["resumed"], "a second run is equal": not told["again"]}
            if told["resumed"] and found.has(20, f"{dtype} with deterministic algorithms"):
                row["with deterministic algorithms"] = deterministic(args, dtype)
            found.row(**row)
            equal[dtype] = not told["resumed"]
            if told["resumed"] and not told["again"]:
                found.told["problems"].append(f"{dtype}: resuming changes the run, repeating it does not")
    found.write(figures="; ".join(f"{dtype}: {'equal' if yes else 'not equal'}" for dtype, yes in equal.items()))


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--deterministic", choices=TYPES, help="compare this type with deterministic algorithms only")
    args = parser.parse_args()
    models, updates = args.work/"resume", 2 if args.quick else 6
    if not (models/"prompts.jsonl").exists(): make("tiny", models)
    if args.deterministic: main_deterministic(args, models, updates)
    else:
        found = Found(args)
        main(found, args, models, updates)
        raise SystemExit(found.exit_status())
