"""What `plan` says of the peak of a run on a CPU, and what it is: plans.py [SETTING ...]"""
import subprocess
import sys
import tempfile
from pathlib import Path

from models import SHAPES, make

from rlhf_nb.config import ModelArguments, PPOConfig
from rlhf_nb.plan import Device, plan

MODELS = {  # As in `SHAPES`; prompts are as long as any setting here asks for
    "medium": dict(policy=(12, 12, 768, 100_000), reward=(6, 12, 768, 50_000), prompt=256),
    "small": dict(policy=(6, 8, 512, 50_000), reward=(4, 8, 512, 20_000), prompt=256),
    "560m": SHAPES["560m"],
}
LONG = dict(num_ppo_epochs=1, max_source_length=256, max_target_length=128, batch_size=8, mini_batch_size=8)
SHORT = dict(num_ppo_epochs=1, max_source_length=128, max_target_length=64, batch_size=4, mini_batch_size=4)
SETTINGS = {  # Models, settings of PPOConfig and of ModelArguments
    "LoRA, bfloat16": ("medium", LONG | dict(torch_dtype="bfloat16"), {}),
    "LoRA, float32": ("medium", LONG | dict(torch_dtype="float32", max_source_length=192), {}),
    "gradient_checkpointing": ("medium", LONG | dict(torch_dtype="bfloat16", max_source_length=64, max_target_length=192, mini_batch_size=2,
                                                     gradient_accumulation_steps=2, gradient_checkpointing=True), {}),
    "use_peft False": ("medium", SHORT | dict(torch_dtype="bfloat16"), dict(use_peft=False)),
    "560m": ("560m", LONG | dict(torch_dtype="bfloat16", batch_size=2, mini_batch_size=1, max_target_length=64), {}),
    "small, LoRA": ("small", SHORT | dict(torch_dtype="float32", max_source_length=192, batch_size=8, mini_batch_size=8), {}),
    "small, use_peft False": ("small", SHORT | dict(torch_dtype="float32"), dict(use_peft=False)),
}
RUN = """
import re, sys
from pathlib import Path
from rlhf_nb.cli import main
main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def planned_and_measured(name: str, work: Path) -> tuple[float, float, str]: # Bytes; and the phase of the planned peak
    "One setting."
    shape, settings, of_model = SETTINGS[name]
    folder = work/shape
    SHAPES.setdefault(shape, MODELS[shape])
    if not (folder/"prompts.jsonl").exists(): make(shape, folder)
    settings = settings | dict(min_target_length=settings["max_target_length"], max_steps=2, save_steps=0, log_with="none", disable_tqdm=True)
    of_model = of_model | dict(model_name_or_path=str(folder/"policy"), reward_model_name_or_path=str(folder/"reward"))
    flags = settings | of_model | dict(train_file_dir=folder/"prompts.jsonl", validation_split_percentage=0, do_train=True)
    found = plan(ModelArguments(**of_model), PPOConfig(**settings), Device("this machine", "cpu", 0, None, None, None, True))
    with tempfile.TemporaryDirectory() as out:
        flags = [text for k, v in (flags | dict(output_dir=out)).items() for text in (f"--{k}", str(v))]
        run = subprocess.run([sys.executable, "-c", RUN, "train", *flags], capture_output=True, text=True)
    if run.returncode: raise RuntimeError(run.stderr[-2000:])
    return found.peak, int(run.stdout.split()[-1]) * 1024, found.phase


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as work:
        print(f"{'':24}{'planned, GB':>12}{'measured':>10}{'planned / measured':>20}  peak at")
        for name in sys.argv[1:] or [n for n in SETTINGS if not n.startswith("small")]:
            planned, measured, phase = planned_and_measured(name, Path(work))
            print(f"{name:24}{planned / 1e9:12.2f}{measured / 1e9:10.2f}{planned / measured:20.2f}  {phase}", flush=True)
