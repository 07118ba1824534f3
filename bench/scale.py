"""Time updates of several shapes, and collectives alone, in the processes of a launcher: scale.py OUT [--steps 3]"""
import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from datasets import Dataset
from peft import LoraConfig
from phases import timed_update
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode  # The only way to see collectives that FSDP2 makes itself

from rlhf_nb.config import PPOConfig
from rlhf_nb.testing import tiny_policy
from rlhf_nb.trainer import PPOTrainer

SHAPES = [ # Layers, hidden size, heads, prompts per process, prompt and completion in tokens
    (4, 256, 4, 8, 32, 32),
    (8, 256, 4, 8, 64, 64),
    (4, 512, 8, 8, 64, 64),
    (8, 512, 8, 4, 64, 96),
    (8, 768, 12, 8, 64, 64),
    (12, 768, 12, 4, 128, 128),
    (8, 1024, 16, 4, 64, 64),
]
EPOCHS, PASSES = 2, 2 # Passes of an epoch, an optimizer step each


class Collectives(TorchDispatchMode):
    "Counts them."
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **kwargs or {})


def lengths(prompts: list, completions: list[str], **columns) -> list[float]:
    "A reward that costs no time."
    return [float(len(c)) for c in completions]


def make_trainer(layers: int, hidden: int, heads: int, batch: int, prompt: int, answer: int, out: str) -> PPOTrainer:
    "A BLOOM of this shape with random weights."
    lm, tok = tiny_policy("bloom", n_layer=layers, hidden_size=hidden, n_head=heads)
    ids = [torch.randint(100, 900, (4 * prompt,), generator=torch.Generator().manual_seed(i)) for i in range(64)]
    args = PPOConfig(
        output_dir=out,
        per_device_train_batch_size=batch // PASSES,
        steps_per_generation=PASSES,
        num_iterations=EPOCHS,
        max_steps=100,
        learning_rate=1e-5,
        max_prompt_length=prompt,
        max_completion_length=answer,
        min_completion_length=answer,
        bf16=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_dict(dict(prompt=[tok.decode(row.tolist()) for row in ids]))
    return PPOTrainer(lm.to(torch.bfloat16), lengths, args, data, processing_class=tok, peft_config=LoraConfig(r=8))


def held(p: torch.Tensor) -> int: # Bytes
    "What this process keeps of a weight."
    return (p.to_local() if isinstance(p, DTensor) else p).nbytes


def measure(shape: tuple[int, ...], steps: int, state: PartialState) -> dict:
    "Median seconds of an update's parts."
    layers, hidden, _, batch, prompt, answer = shape
    with tempfile.TemporaryDirectory() as out: trainer = make_trainer(*shape, out)
    with Collectives() as counted: timed_update(trainer, next(trainer.batches()))
    seconds = []
    for _, rows in zip(range(steps), trainer.batches()):
        state.wait_for_everyone()
        start = time.perf_counter()
        spent, metrics = timed_update(trainer, rows)
        state.wait_for_everyone()
        assert metrics["completions/mean_length"] == answer
        seconds.append(spent | dict(total=time.perf_counter() - start))
    named = list(trainer.policy.named_parameters())
    return dict(
        layers=layers,
        kv=hidden,
        batch=batch,
        prompt=prompt,
        answer=answer,
        body=sum(p.numel() for name, p in named if ".h." in name and not p.requires_grad),
        head=trainer.model.config.vocab_size * hidden,
        trained=sum(p.numel() for p in trainer.strategy.trained),
        collectives=counted.seen,
        held=sum(held(p) for _, p in named),
        **{part: median(s[part] for s in seconds) for part in seconds[0]},
    )


def timed(work: Callable, state: PartialState, n: int = 9) -> float:
    "Median seconds, all processes at once."
    seconds = []
    for _ in range(n):
        state.wait_for_everyone()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def collectives(sizes: list[int], state: PartialState) -> dict[str, list[dict]]:
    "Seconds of a sum over processes and of a gathering, by bytes that each ends with."
    n = state.num_processes
    if n == 1: return {}
    summed, gathered = [], []
    for size in sizes:
        x = torch.ones(size)
        parts = [torch.empty(size // n) for _ in range(n)]
        summed.append(dict(bytes=x.nbytes, seconds=timed(lambda: dist.all_reduce(x), state)))
        gathered.append(dict(bytes=x.nbytes, seconds=timed(lambda: dist.all_gather(parts, x[:size // n]), state)))
    return dict(sum=summed, gather=gathered)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    state = PartialState(cpu=not torch.accelerator.is_available())
    numbers = torch.ones(2 ** 25, dtype=torch.int64)
    a = torch.randn(1024, 1024, dtype=torch.bfloat16)
    b = torch.randn(4096, 1024, dtype=torch.bfloat16)
    found = dict(
        processes=state.num_processes,
        epochs=EPOCHS,
        passes=PASSES,
        read=numbers.nbytes / timed(numbers.sum, state),
        operations=2 * b.numel() * 1024 / timed(lambda: a @ b.T, state),
        collectives=collectives([2 ** n for n in range(8, 25, 2)], state),
        updates=[measure(shape, args.steps, state) for shape in SHAPES],
    )
    if state.is_main_process: args.out.write_text(json.dumps(found, indent=1) + "\n")
    gc.collect() # A sharded policy must not outlive its process group
    state.destroy_process_group()
