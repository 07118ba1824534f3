"""Where the time of an update goes, by kind of operation: operations.py WORK OUT.json [SHAPE ...]"""
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from models import SHAPES, make
from ours import trainer_of
from run import PHASES
from torch.profiler import ProfilerActivity, profile

import rlhf_nb.rollout

KINDS = { # Operations, by the end of their names; all others are "small operations"
    "matrix products": "mm addmm addmm_ bmm baddbmm _linear_pointwise",
    "activations, norms, sums": "gelu silu gelu_backward silu_backward pow rsqrt mean sum vecdot linalg_vector_norm "
                                "mul mul_ add add_ sub sub_ div div_ neg addcmul exp exp_ log logsumexp amax _softmax "
                                "_softmax_backward_data cumsum where masked_fill_",
    "copies": "copy_ cat clone fill_ zero_ _to_copy index index_copy_ gather",
}
KIND_OF = {op: kind for kind, ops in KINDS.items() for op in ops.split()}


def profiled(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]: # Seconds by kind
    "What it returns, and where its time went; the rest is Python and waiting."
    with profile(activities=[ProfilerActivity.CPU]) as found:
        start = time.perf_counter()
        result = work()
        wall = time.perf_counter() - start
    seconds: Counter[str] = Counter()
    for event in found.key_averages():
        op = event.key.rpartition("::")[2]
        seconds[KIND_OF.get(op, "small operations")] += event.self_cpu_time_total / 1e6
    return result, dict(seconds) | dict(Python=max(0., wall - sum(seconds.values())))


def update(models: Path, shape: str) -> dict[str, dict[str, float]]: # Seconds by phase and kind
    "The second update of a run; profiling makes small operations slower."
    found: dict[str, dict[str, float]] = {}

    def wrapped(name: str, work: Callable) -> Callable:
        def run(*args, **kwargs):
            result, found[name] = profiled(lambda: work(*args, **kwargs))
            return result
        return run

    with tempfile.TemporaryDirectory() as out:
        trainer = trainer_of(models, shape, SHAPES[shape]["epochs"][0], 2, torch.bfloat16, out)
        batches = trainer.batches()
        first, rows = next(batches), next(batches)
        rollout = trainer.rollout(first)
        trainer.step(rollout, trainer.score(rollout))
        inside = {name: wrapped(phase, getattr(rlhf_nb.rollout, name))
                  for phase, name in dict(write="generate", look="score_batch").items()}
        with patch.multiple(rlhf_nb.rollout, **inside): rollout = trainer.rollout(rows)
        scores = wrapped("reward", trainer.score)(rollout)
        wrapped("update", trainer.step)(rollout, scores)
    return {phase: found[phase] for phase in PHASES}


if __name__ == "__main__":
    work, out, *shapes = sys.argv[1:]
    found = json.loads(Path(out).read_text()) if Path(out).exists() else {}
    for shape in shapes or SHAPES:
        models = Path(work)/shape
        if not (models/"prompts.jsonl").exists(): make(shape, models)
        found[shape] = update(models, shape)
        print(shape, found[shape], flush=True)
        Path(out).write_text(json.dumps(found, indent=1) + "\n")
