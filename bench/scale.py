"""Time updates of several shapes, and the collectives alone, in the processes that a launcher started; rank 0 writes JSON: scale.py OUT [--steps 3]"""
import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_nb.rollout
from rlhf_nb.config import PPOConfig
from rlhf_nb.models import run_device
from rlhf_nb.tiny import tiny_policy
from rlhf_nb.trainer import PPOTrainer

SHAPES = [ # Layers, hidden size, heads, prompts per process, prompt and answer in tokens
    (4, 256, 4, 8, 32, 32), (8, 256, 4, 8, 64, 64), (4, 512, 8, 8, 64, 64), (8, 512, 8, 4, 64, 96), (8, 768, 12, 8, 64, 64), (12, 768, 12, 4, 128, 128), (8, 1024, 16, 4, 64, 64)]
EPOCHS, PASSES = 2, 2 # Passes of an epoch, an optimiser step each

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--steps", type=int, default=3)
args = parser.parse_args()
torch.set_num_threads(1)
device = run_device()
state = PartialState()


class Collectives(TorchDispatchMode):
    "Counts them."
    seen = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func.namespace in ("c10d", "_c10d_functional")
        return func(*args, **kwargs or {})


def spent(seconds: list[float], work):
    "`work`, with the seconds of each call added to a list."
    def timed(*a, **k):
        start = time.perf_counter()
        try: return work(*a, **k)
        finally: seconds[-1] += time.perf_counter() - start
    return timed


def update(layers: int, hidden: int, heads: int, batch: int, prompt: int, answer: int) -> dict:
    "Median seconds of an update's parts."
    lm, tok = tiny_policy("bloom", n_layer=layers, hidden_size=hidden, n_head=heads)
    texts = [tok.decode(torch.randint(100, 900, (4 * prompt,), generator=torch.Generator().manual_seed(i)).tolist()) for i in range(64)]
    with tempfile.TemporaryDirectory() as out:
        config = PPOConfig(output_dir=out, batch_size=batch, mini_batch_size=batch // PASSES, num_ppo_epochs=EPOCHS, max_source_length=prompt, max_target_length=answer,
                           min_target_length=answer, torch_dtype="bfloat16", learning_rate=1e-5, log_with="none", disable_tqdm=True, log_completions=False, max_steps=100)
        trainer = PPOTrainer(lm.to(torch.bfloat16), lambda completions, **_: [float(len(c)) for c in completions], config, Dataset.from_dict(dict(prompt=texts)),
                             processing_class=tok, peft_config=LoraConfig(r=8))
    writing, summing, seconds = [0.], [0.], []
    rlhf_nb.rollout.generate, usual = spent(writing, rlhf_nb.rollout.generate), rlhf_nb.rollout.generate
    trainer.summed, trainer.layout.sum_gradients = spent(summing, trainer.summed), spent(summing, trainer.layout.sum_gradients)
    with Collectives() as counted: trainer.timed_step(next(trainer.batches()))
    for _, rows in zip(range(args.steps), trainer.batches()):
        writing.append(0.), summing.append(0.), state.wait_for_everyone()
        start = time.perf_counter()
        seen = trainer.timed_step(rows)
        state.wait_for_everyone()
        total = time.perf_counter() - start
        assert seen["tokens/responses"] == answer
        seconds.append(dict(write=writing[-1], look=seen["time/rollout"] - writing[-1], update=seen["time/step"], total=total, sums=summing[-1]))
    rlhf_nb.rollout.generate = usual
    body = sum(p.numel() for name, p in trainer.policy.named_parameters() if ".h." in name and not p.requires_grad)
    return dict(layers=layers, kv=hidden, batch=batch, prompt=prompt, answer=answer, body=body, head=lm.config.vocab_size * hidden,
                trained=sum(p.numel() for p in trainer.trained), collectives=counted.seen,
                held=sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in trainer.policy.parameters()), **{k: median(s[k] for s in seconds) for k in seconds[0]})


def timed(work, n: int = 9) -> float:
    "Median seconds, all processes at once."
    seconds = []
    for _ in range(n):
        state.wait_for_everyone()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def collectives(sizes: list[int]) -> dict[str, list[dict]]:
    "Seconds of a sum over processes and of a gathering, by bytes that each ends with."
    if state.num_processes == 1: return {}
    summed, gathered = [], []
    for n in sizes:
        x, parts = torch.ones(n), [torch.empty(n // state.num_processes) for _ in range(state.num_processes)]
        summed.append(dict(bytes=4 * n, seconds=timed(lambda: dist.all_reduce(x))))
        gathered.append(dict(bytes=4 * n, seconds=timed(lambda: dist.all_gather(parts, x[:n // state.num_processes]))))
    return dict(sum=summed, gather=gathered)


numbers, a, b = torch.ones(2 ** 25, dtype=torch.int64), torch.randn(1024, 1024, dtype=torch.bfloat16), torch.randn(4096, 1024, dtype=torch.bfloat16)
found = dict(processes=state.num_processes, epochs=EPOCHS, passes=PASSES, read=numbers.nbytes / timed(numbers.sum), operations=2 * b.numel() * 1024 / timed(lambda: a @ b.T),
             collectives=collectives([2 ** n for n in range(8, 25, 2)]), updates=[update(*s) for s in SHAPES])
if state.is_main_process: args.out.write_text(json.dumps(found, indent=1) + "\n")
state.destroy_process_group()
