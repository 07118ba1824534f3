"Runs of tiny models on the GPU, in float16 as on a T4."
import json
from pathlib import Path

import torch

from rlhf_nb.cli import as_flags, make_trainer, train_parser
from rlhf_nb.testing import count_e
from rlhf_nb.trainer import PPOTrainer

SMALL = dict(
    dtype="float16",
    do_train=True,
    validation_split_percentage=0,
    max_steps=2,
    save_steps=1,
    logging_steps=1,
    per_device_train_batch_size=2,
    steps_per_generation=2,
    num_iterations=2,
    prompt_template="{}",
    max_prompt_length=24,
    max_completion_length=8,
    min_completion_length=4,
    learning_rate=1e-3,
    lr_scheduler_type="constant",
    report_to="none",
    disable_tqdm=True,
    reward_weights=[1., .1],
)
# Longer than max_prompt_length, so that every prompt is as long as that
QUESTIONS = [f"Tell me about the number {i}, " + "and about the next number, " * 20 for i in range(20)]


def settings(tiny: tuple[Path, Path], out: Path, **more) -> tuple:
    "Parsed settings of a run in a folder: of the model, the data and the trainer."
    data = Path(out)/"data"
    data.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(dict(instruction=question, input="", output="Yes.")) for question in QUESTIONS]
    (data/"rows.jsonl").write_text("\n".join(rows))
    named = dict(model_name_or_path=tiny[0], reward_model_name_or_path=tiny[1], train_file_dir=data,
                 output_dir=Path(out)/"run")
    model_args, data_args, args, *_ = train_parser().read(as_flags(SMALL | named | more))
    return model_args, data_args, args


def make(tiny: tuple[Path, Path], out: Path, **more) -> PPOTrainer:
    "A trainer of the tiny policy, with a reward model and a function."
    return make_trainer(*settings(tiny, out, **more), count_e)


def tensors_in(value) -> list[torch.Tensor]:
    "Every tensor within named tuples, dictionaries and lists."
    if isinstance(value, torch.Tensor): return [value]
    if isinstance(value, dict): value = list(value.values())
    if isinstance(value, (list, tuple)): return [x for part in value for x in tensors_in(part)]
    return []


def devices(value) -> set[str]:
    "Where its tensors are."
    return {x.device.type for x in tensors_in(value)}
