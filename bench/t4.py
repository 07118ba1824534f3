"""The original's run on one GPU: random models of its shapes, float16, at most 15 GiB: t4.py OUT.json [--steps 10]"""
import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import torch
from models import SHAPES, make

from rlhf_nb.cli import as_flags, make_trainer, train_parser
from rlhf_nb.memory import GPUS, plan

CAP = 15 * 2**30 # Bytes
PHASES = "rollout", "score", "step"


def settings_of(shape: str, steps: int, folder: Path) -> dict:
    "The original's flags, with models and prompts from the folder."
    s = SHAPES[shape]
    return dict(
        model_type="bloom",
        model_name_or_path=folder/"policy",
        reward_model_name_or_path=folder/"reward",
        torch_dtype="float16" if torch.cuda.is_available() else "auto",
        train_file_dir=folder/"prompts.jsonl",
        validation_split_percentage=0,
        batch_size=2,
        max_source_length=s["prompt"],
        max_target_length=s["response"],
        min_target_length=s["response"],
        lora_rank=8,
        lora_alpha=16,
        do_train=True,
        max_steps=steps,
        learning_rate=1e-5,
        save_steps=0,
        output_dir=folder/"out",
        early_stopping=True,
        target_kl=.1,
        disable_tqdm=True,
    )


def measure(shape: str, steps: int, folder: Path) -> dict:
    "Weights, peak and seconds of an update; on a CPU only the seconds."
    make(shape, folder)
    on_gpu = torch.cuda.is_available()
    model_args, data_args, args, *_ = train_parser().read(as_flags(settings_of(shape, steps, folder)))
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    planned = plan(model_args, args, GPUS["T4"]).peak
    found = dict(device=device, shape=shape, updates=steps, planned_peak=planned)
    if on_gpu:
        all_memory = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1, CAP / all_memory))
    trainer = make_trainer(model_args, data_args, args)
    if on_gpu: found |= dict(weights=torch.cuda.memory_allocated())
    trainer.train()
    if on_gpu: found |= dict(peak=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())
    seconds = {name: median(trainer.history(f"time/{name}")) for name in PHASES}
    return found | dict(seconds=seconds, hundred_updates=100 * sum(seconds.values()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="560m")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder: found = measure(args.shape, args.steps, Path(folder))
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
