"""The original's run on one GPU: random models of its shapes, float16, at most 15 GiB: t4.py OUT.json [--steps 10]"""
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from found import Found, Until, arguments, card, on_gpu
from models import SHAPES, make

from rlhf_nb.cli import as_flags, make_trainer, train_parser
from rlhf_nb.memory import GPUS, Plan, plan, this_machine
from rlhf_nb.trainer import PPOTrainer

CAP = 15 * 2**30 # Bytes
PHASES = dict(rollout=("generate", "logprobs"), score=("score",), step=("update",)) # With those of the plan


def settings_of(shape: str, steps: int, folder: Path, out: str) -> dict:
    "The original's flags, with models and prompts from the folder."
    s = SHAPES[shape]
    return dict(
        model_type="bloom",
        model_name_or_path=folder/"policy",
        reward_model_name_or_path=folder/"reward",
        torch_dtype="float16" if on_gpu() else "auto",
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
        output_dir=out,
        early_stopping=True,
        target_kl=.1,
        disable_tqdm=True,
        report_to="none",
    )


def models_of(shape: str, work: Path) -> Path:
    "The folder with models and prompts; they are made if they are not there."
    folder = work/shape
    if not (folder/"prompts.jsonl").exists():
        make(shape, folder, torch.float16 if on_gpu() else torch.bfloat16)
    return folder


def tokens_of(shape: str) -> dict[str, int]:
    "Tokens that each phase of an update works on: generated ones, those the reward model reads, those passed through."
    s = SHAPES[shape]
    both = s["prompt"] + s["response"]
    return dict(rollout=2 * s["response"], score=2 * min(both, 512), step=2 * s["epochs"][-1] * both)


def phase_row(phase: str, trainer: PPOTrainer, tokens: int, planned: Plan) -> dict[str, Any]:
    "Seconds, tokens per second, the shortest time that the card's rates allow, and what the plan expects."
    seconds = median(trainer.history(f"time/{phase}"))
    row = {"phase": phase, "seconds": seconds, "tokens": tokens, "tokens/s": tokens / seconds}
    if not (planned.floor and on_gpu()): return row
    least, expected = (sum(times[name] for name in PHASES[phase]) for times in (planned.floor, planned.times))
    return row | {"floor, s": least, "times the floor": seconds / least, "planned, s": expected}


def memory_of(found: Found, planned: Plan, weights: int):
    "Peaks that were measured, beside the planned one, which has the context and libraries besides."
    program = planned.phases[planned.phase]["program"]
    free, total = torch.cuda.mem_get_info()
    reserved = torch.cuda.memory_reserved()
    peak = torch.cuda.max_memory_allocated()
    found.write(
        weights=weights,
        peak=peak,
        reserved=torch.cuda.max_memory_reserved(),
        planned_tensors=planned.peak - program,
        planned_program=program,
        program=total - free - reserved,
    )
    found.note(f"memory: {peak / 1e9:.2f} GB at the peak, {(planned.peak - program) / 1e9:.2f} GB planned; "
               f"reserved {torch.cuda.max_memory_reserved() / 1e9:.2f} GB of {CAP / 1e9:.2f} GB")


def measure(shape: str, steps: int, found: Found, work: Path):
    "Weights, peak and seconds of an update; on a CPU only the seconds."
    folder = models_of(shape, work)
    with tempfile.TemporaryDirectory() as out:
        model_args, data_args, args, *_ = train_parser().read(as_flags(settings_of(shape, steps, folder, out)))
        device = this_machine() if on_gpu() else GPUS["T4"]
        planned = plan(model_args, args, device)
        found.write(device=card(), shape=shape, planned_peak=planned.peak, floor=planned.floor)
        if on_gpu():
            torch.cuda.empty_cache()
            all_memory = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1, CAP / all_memory))
            torch.cuda.reset_peak_memory_stats()
        trainer = make_trainer(model_args, data_args, args)
        weights = torch.cuda.memory_allocated() if on_gpu() else 0
        trainer.add_callback(Until(found.end))
        trainer.train()
    if on_gpu(): memory_of(found, planned, weights)
    for phase, tokens in tokens_of(shape).items(): found.row(**phase_row(phase, trainer, tokens, planned))
    seconds = {phase: median(trainer.history(f"time/{phase}")) for phase in PHASES}
    report(found, trainer, seconds, steps)


def report(found: Found, trainer: PPOTrainer, seconds: dict[str, float], steps: int):
    "Numbers of the whole run."
    updates = trainer.state.global_step
    spent = [sum(each) for each in zip(*(trainer.history(f"time/{phase}") for phase in PHASES))]
    update = sum(seconds.values())
    hundred = 100 * update
    scales = trainer.history("policy/loss_scale")
    skipped = int(trainer.last("val/skipped_updates"))
    made = sum(trainer.history("policy/optimizer_steps"))
    found.write(updates=updates, seconds=seconds, first_update=spent[0], hundred_updates=hundred, skipped=skipped,
                loss_scales=scales, optimizer_steps=made, spent=spent)
    extrapolated = "" if updates >= 100 else f", extrapolated from {updates} updates"
    found.note(f"{updates} of {steps} updates, {skipped} skipped, {made:.0f} optimizer steps, the first update "
               f"{spent[0]:.2f} s; loss scale {f'{scales[0]:g} to {scales[-1]:g}' if scales else 'none'}")
    peak = f"; peak {found.told['peak'] / 1e9:.2f} GB" if on_gpu() else ""
    found.write(figures=f"{update:.2f} s per update, 100 updates in {hundred / 60:.1f} min{extrapolated}{peak}")


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    found = Found(args)
    shape = args.shape or ("tiny" if args.quick else "560m")
    steps = args.steps or (2 if args.quick else 100)
    measure(shape, steps, found, args.work)
    raise SystemExit(found.exit_status())
