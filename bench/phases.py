"""One update, with the seconds of its phases."""
import time
from unittest.mock import patch

import rlhf_nb.rollout
from rlhf_nb.trainer import PPOTrainer


def timed_update(trainer: PPOTrainer,
                 rows: list[dict],          # From `trainer.batches()`
) -> tuple[dict[str, float], dict[str, float]]: # Seconds by phase, under the keys of results.json; metrics
    "Rollout, score and step; generating is timed apart from computing log-probs, values and entropy."
    generate = rlhf_nb.rollout.generate
    generating = []

    def timed_generate(*inputs, **more):
        start = time.perf_counter()
        try: return generate(*inputs, **more)
        finally: generating.append(time.perf_counter() - start)

    trainer.runlog.seconds = {}
    with patch("rlhf_nb.rollout.generate", timed_generate): rollout = trainer.rollout(rows)
    scores = trainer.score(rollout)
    metrics = trainer.step(rollout, scores)
    spent, generated = trainer.runlog.seconds, sum(generating)
    seconds = dict(write=generated, look=spent["rollout"] - generated, reward=spent["score"], update=spent["step"])
    return seconds, metrics
