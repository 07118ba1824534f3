"""Does PPO learn on a GPU in half precision? The clinic's run, its true reward before and after: learn.py OUT.json"""
from tempfile import mkdtemp

import torch
from found import Found, Until, arguments, on_gpu, timed
from learning import TRUE, ppo, unseen

from rlhf_nb.config import has_bf16

TYPES = dict(fp16="float16", bf16="bfloat16")


def main(found: Found, args):
    "The demo's settings, the time shared between both types."
    args.work.mkdir(parents=True, exist_ok=True)
    settings = dict(max_steps=1, max_eval_samples=8, batch_size=8, per_device_train_batch_size=8) if args.quick else {}
    types = [dtype for dtype in TYPES if dtype != "bf16" or not on_gpu() or has_bf16(torch.device("cuda"))]
    if len(types) < len(TYPES): found.note("bf16: this GPU has none")
    told = []
    for i, dtype in enumerate(types):
        if not found.has(15, dtype): break
        with found.attempt(dtype):
            trainer = ppo(mkdtemp(dir=args.work), dtype=TYPES[dtype], do_eval=False, **settings)
            until = found.end - found.left() * (len(types) - i - 1) / (len(types) - i)
            trainer.add_callback(Until(until - 5))
            trainer.evaluate()
            _, seconds = timed(trainer.train)
            trainer.evaluate()
            before, after = unseen(trainer)
            updates = trainer.state.global_step
            found.row(**{
                "type": dtype, "updates": updates, "seconds": seconds, "true reward before": before, "after": after,
                "last batches": trainer.last(TRUE), "skipped": int(trainer.last("val/skipped_updates")),
            })
            told.append(f"{dtype} {before:.3f} to {after:.3f} in {updates} updates, {seconds:.0f} s")
            found.write(figures="; ".join(told))
            if updates >= 100 and after < before + .1:
                found.told["problems"].append(f"{dtype}: the true reward went from {before:.3f} to {after:.3f}")
    found.note("True reward on the questions that training never saw, sampled; 1 is the most")


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    found = Found(args)
    main(found, args)
    raise SystemExit(found.exit_status())
