"""The table of all settings: python docs/settings.py prints it."""
from dataclasses import Field, fields
from enum import Enum
from typing import Any

from trl import RLOOConfig

from rlhf_nb.config import OTHER_DEFAULTS, REFUSED, PPOConfig, default_of

INTRO = """# Settings

Every field of `PPOConfig`. It is a `transformers.TrainingArguments`, and has the fields of TRL's `RLOOConfig` with
their names, types and defaults, unless the table says otherwise. A setting that does nothing for PPO is refused when
it is given another value than its default. A step is one PPO update.
"""
HERE = dict( # What transformers' own help does not say, because it does not know PPO
    per_device_train_batch_size="Completions of a process per accumulation step",
    gradient_accumulation_steps="Batches of per_device_train_batch_size per optimizer step",
    num_train_epochs="Passes over the training prompts", max_steps="PPO updates; -1: num_train_epochs decides",
    warmup_steps="PPO updates until the learning rate has reached its peak; below 1: a share of all updates",
    eval_steps="PPO updates between evaluations; below 1: a share of all updates; default: logging_steps",
    save_steps="PPO updates between checkpoints; below 1: a share of all updates",
    per_device_eval_batch_size="Completions that a process generates at once in evaluation",
    fp16="float16 products with loss scaling; on a CPU what the CPU does best",
    disable_tqdm="No live view; default: as the log level says",
    do_train="Read by the command line and by scripts, not by the trainer",
    do_eval="Read by the command line and by scripts, not by the trainer",
    local_rank="Not read: the launcher's environment decides",
    resume_from_checkpoint="Checkpoint from which train() continues without being told",
    remove_unused_columns="Give reward functions no other column than the prompt",
    max_grad_norm="Largest norm of the gradient; 0: no limit",
    load_best_model_at_end="Load the weights of the best checkpoint when training has ended",
    data_seed="Seed of the prompts' order; default: seed")


def as_code(value: Any) -> str:
    "Markdown code of a default value."
    shown = value.value if isinstance(value, Enum) else value
    return f"`{shown!r}`"


def described(field: Field) -> str:
    "What a setting does here."
    if field.name in REFUSED: return f"Refused: {REFUSED[field.name]}"
    text = HERE.get(field.name) or field.metadata.get("help") or ""
    return " ".join(text.split()).rstrip(".").replace("|", "\\|").replace("%%", "%")


def difference(field: Field, theirs: dict[str, Field]) -> str:
    "How the default differs from RLOOConfig's, and why; empty if it does not."
    if field.name not in theirs: return "only here"
    reason, default = OTHER_DEFAULTS.get(field.name), default_of(theirs[field.name])
    if not reason: return ""
    return f"the same, but {reason}" if default == default_of(field) else f"{as_code(default)} there: {reason}"


def settings_table() -> str:
    "A Markdown page with one row per setting."
    theirs = {f.name: f for f in fields(RLOOConfig)}
    rows = ["| setting | default | what it does | RLOOConfig |", "| --- | --- | --- | --- |"]
    for field in fields(PPOConfig):
        cells = f"`{field.name}`", as_code(default_of(field)), described(field), difference(field, theirs)
        rows.append(f"| {' | '.join(cells)} |")
    return INTRO + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__": print(settings_table())
