"""What `rlhf-nb plan` says of the peak of a run on a CPU, and what it is: plans.py [SETTING ...]"""
import subprocess
import sys
import tempfile
from pathlib import Path

from models import SHAPES, bloom, deberta, make

from rlhf_nb.cli import as_flags, train_parser
from rlhf_nb.memory import Device, plan

MODELS = {  # As in `SHAPES`; prompts are as long as any setting here asks for
    "medium": dict(policy=bloom(12, 12, 768, 100_000), reward=deberta(6, 12, 768, 50_000), prompt=256),
    "small": dict(policy=bloom(6, 8, 512, 50_000), reward=deberta(4, 8, 512, 20_000), prompt=256),
    "560m": SHAPES["560m"],
}
LONG = dict(dtype="bfloat16", num_iterations=1, max_prompt_length=256, max_completion_length=128,
            per_device_train_batch_size=8, steps_per_generation=1)
SHORT = LONG | dict(max_prompt_length=128, max_completion_length=64, per_device_train_batch_size=4)
SETTINGS = {  # Models and settings
    "LoRA, bfloat16": ("medium", LONG),
    "LoRA, float32": ("medium", LONG | dict(dtype="float32", max_prompt_length=192)),
    "gradient_checkpointing": ("medium", LONG | dict(
        max_prompt_length=64, max_completion_length=192, per_device_train_batch_size=2, steps_per_generation=4,
        gradient_accumulation_steps=2, gradient_checkpointing=True)),
    "use_peft False": ("medium", SHORT | dict(use_peft=False)),
    "560m": ("560m", LONG | dict(per_device_train_batch_size=1, steps_per_generation=2, max_completion_length=64)),
    "small, LoRA": ("small", SHORT | dict(dtype="float32", max_prompt_length=192, per_device_train_batch_size=8)),
    "small, use_peft False": ("small", SHORT | dict(dtype="float32", use_peft=False)),
}
CPU = Device("this machine", "cpu", 0, None, None, None, True)
RUN = """
import re, sys
from pathlib import Path
from rlhf_nb.program import main
main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def planned_and_measured(name: str, work: Path) -> tuple[float, float, str]: # Bytes; and the phase of the planned peak
    "One setting."
    shape, settings = SETTINGS[name]
    folder = work/shape
    SHAPES.setdefault(shape, MODELS[shape])
    if not (folder/"prompts.jsonl").exists(): make(shape, folder)
    settings = settings | dict(
        model_name_or_path=folder/"policy",
        reward_model_name_or_path=folder/"reward",
        train_file_dir=folder/"prompts.jsonl",
        validation_split_percentage=0,
        min_completion_length=settings["max_completion_length"],
        do_train=True,
        max_steps=2,
        save_steps=0,
        report_to="none",
        disable_tqdm=True,
    )
    with tempfile.TemporaryDirectory() as out:
        flags = as_flags(settings | dict(output_dir=out))
        model_args, _, args, *_ = train_parser().read(flags)
        found = plan(model_args, args, CPU)
        run = subprocess.run([sys.executable, "-c", RUN, "train", *flags], capture_output=True, text=True)
    if run.returncode: raise RuntimeError(run.stderr[-2000:])
    return found.peak, int(run.stdout.split()[-1]) * 1024, found.phase


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        print(f"{'':24}{'planned, GB':>12}{'measured':>10}{'planned / measured':>20}  peak at")
        for name in sys.argv[1:] or [n for n in SETTINGS if not n.startswith("small")]:
            planned, measured, phase = planned_and_measured(name, Path(work))
            print(f"{name:24}{planned / 1e9:12.2f}{measured / 1e9:10.2f}{planned / measured:20.2f}  {phase}")
