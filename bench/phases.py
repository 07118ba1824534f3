"""One update, with the seconds of its phases."""
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch

import rlhf_nb.decoding
import rlhf_nb.rollout
from rlhf_nb.trainer import PPOTrainer


@contextmanager
def generating() -> Iterator[list[float]]: # Seconds of each batch of prompts
    "Time the sampler's generation, apart from computing log-probs, values and entropy."
    seconds: list[float] = []

    def timed(generate: Callable) -> Callable:
        def wrapper(*inputs, **more):
            start = time.perf_counter()
            try: return generate(*inputs, **more)
            finally:
                if torch.cuda.is_available(): torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
        return wrapper

    eager, static = rlhf_nb.rollout.generate, rlhf_nb.decoding.generate_static
    with patch("rlhf_nb.rollout.generate", timed(eager)), patch("rlhf_nb.decoding.generate_static", timed(static)):
        yield seconds


def timed_update(trainer: PPOTrainer,
                 rows: list[dict],          # From `trainer.batches()`
) -> tuple[dict[str, float], dict[str, float]]: # Seconds by phase, under the keys of results.json; metrics
    "Rollout, score and step; generating is timed apart."
    trainer.runlog.seconds = {}
    with generating() as batches: rollout = trainer.rollout(rows)
    scores = trainer.score(rollout)
    metrics = trainer.step(rollout, scores)
    spent, generated = trainer.runlog.seconds, sum(batches)
    seconds = dict(write=generated, look=spent["rollout"] - generated, reward=spent["score"], update=spent["step"])
    return seconds, metrics
