"""An update of today's small models in both half precisions, random weights of their shapes: shapes.py OUT.json"""
import gc
import math
from pathlib import Path
from tempfile import mkdtemp

import torch
from datasets import Dataset
from found import Found, arguments, on_gpu
from models import decoder_config, random_decoder
from transformers import PreTrainedTokenizerFast

from rlhf_nb.config import ModelArguments, PPOConfig, has_bf16
from rlhf_nb.memory import GPUS, Device, lora, plan
from rlhf_nb.testing import policy_tokenizer, shipped_texts, tiny_reward_model
from rlhf_nb.trainer import PPOTrainer

SHAPES = "Gemma 3 270M", "Qwen3 0.6B", "Gemma 3 1B"
TYPES = dict(fp16="float16", bf16="bfloat16")
ROWS, PROMPT, COMPLETION = 4, 256, 128
PHASES = "rollout", "score", "step"


def folders(name: str, work: Path, quick: bool) -> tuple[Path, Path]:
    "Configuration of the policy, for the plan; a reward model that costs little."
    policy, reward = work/name.replace(" ", "_"), work/"small_reward"
    decoder_config(name, quick).save_pretrained(policy)
    if not reward.exists():
        for part in tiny_reward_model(): part.save_pretrained(reward)
    return policy, reward


def this_card() -> Device:
    "Its memory and types; rates do not matter for the plan's memory."
    if not on_gpu(): return GPUS["T4"]
    memory = torch.cuda.get_device_properties(0).total_memory
    return GPUS["T4"]._replace(name="this card", memory=memory, bf16=has_bf16(torch.device("cuda")))


def settings_of(dtype: str, args) -> PPOConfig: # A key of `TYPES`
    "Two updates of one optimizer step each."
    length = 8 if args.quick else COMPLETION
    return PPOConfig(
        output_dir=mkdtemp(dir=args.work),
        per_device_train_batch_size=ROWS,
        max_steps=2,
        max_prompt_length=PROMPT,
        max_completion_length=length,
        min_completion_length=length,
        fp16=dtype == "fp16",
        bf16=dtype == "bf16",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def planned(policy: Path, reward: Path, args) -> float: # GB
    "The plan's peak, without its share for the CUDA context; it is the same for both types."
    model_args = ModelArguments(model_name_or_path=str(policy), reward_model_name_or_path=str(reward), dtype="float16")
    found = plan(model_args, settings_of("fp16", args), this_card())
    return (found.peak - found.phases[found.phase]["program"]) / 1e9


def trained(name: str, dtype: str, reward: Path, tok: PreTrainedTokenizerFast, args) -> PPOTrainer: # After its run
    "Train an adapter on a random model."
    ids = tok(" ".join(shipped_texts())).input_ids
    prompts = [dict(prompt=tok.decode(ids[PROMPT * i:PROMPT * (i + 1)])) for i in range(2 * ROWS)]
    trainer = PPOTrainer(
        random_decoder(decoder_config(name, args.quick), getattr(torch, TYPES[dtype])),
        str(reward),
        settings_of(dtype, args),
        Dataset.from_list(prompts),
        processing_class=tok,
        peft_config=lora(ModelArguments()),
    )
    trainer.train()
    return trainer


def free():
    "Give memory back, and forget the last peak."
    gc.collect()
    if on_gpu():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def row_of(trainer: PPOTrainer, expected: float | None) -> dict: # The plan's GB
    "What the second update took, and whether its numbers are finite."
    row = {f"{phase}, s": trainer.last(f"time/{phase}") for phase in PHASES}
    if on_gpu(): row["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    numbers = [trainer.last(name) for name in ("loss", "grad_norm", "entropy", "kl")]
    row |= {"planned, GB": expected, "all finite": all(map(math.isfinite, numbers)),
            "skipped": int(trainer.last("val/skipped_updates")), "entropy, nats": trainer.last("entropy")}
    if scales := trainer.history("policy/loss_scale"): row["loss scale"] = scales[-1]
    return row


def main(found: Found, args):
    "Every shape in every type."
    args.work.mkdir(parents=True, exist_ok=True)
    tok = policy_tokenizer()
    types = [dtype for dtype in TYPES if dtype != "bf16" or not on_gpu() or this_card().bf16]
    if len(types) < len(TYPES): found.note("bf16: this GPU has none")
    for name in SHAPES:
        if not found.has(15, name): break
        policy, reward = folders(name, args.work, args.quick)
        expected = None
        with found.attempt(f"{name}, plan"): expected = planned(policy, reward, args)
        for dtype in types:
            if not found.has(8, f"{name}, {dtype}"): break
            free()
            with found.attempt(f"{name}, {dtype}"):
                row = row_of(trained(name, dtype, reward, tok, args), expected)
                found.row(shape=name, type=dtype, **row)
                if not row["all finite"] or row["skipped"]:
                    found.told["problems"].append(f"{name}, {dtype}: numbers are not finite")
            tell(found)
    found.note(f"{ROWS} prompts of {PROMPT} tokens, completions of {COMPLETION}, one optimizer step, LoRA of rank 8; "
               "the second of two updates; the plan without its share for the CUDA context")


def tell(found: Found):
    "The summary."
    seconds = [f"{row['shape']} {row['type']} {sum(row[f'{phase}, s'] for phase in PHASES):.2f} s"
               for row in found.told["table"]]
    found.write(figures=f"an update of {ROWS} completions: " + "; ".join(seconds))


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    found = Found(args)
    main(found, args)
    raise SystemExit(found.exit_status())
