"""Every number that a run logs, from templates/metrics.yaml: for views, report, diagnosis and documentation."""
import math
import re
from statistics import mean
from typing import NamedTuple

from .tables import table


class Metric(NamedTuple):
    "A number that a run logs."
    name: str                # Log key; NAME stands for the name of a reward
    label: str               # In plots and tables
    meaning: str             # One sentence
    unit: str = ""
    healthy: str = ""        # What to expect of a run that goes well
    evaluated: bool = False  # Logged by evaluations too, with the prefix eval_
    only: str = ""           # When it is logged, if not always

    @property
    def title(self) -> str:
        "Label and unit."
        return f"{self.label}, {self.unit}" if self.unit else self.label


METRICS = {name: Metric(name, **entry) for name, entry in table("metrics").items()}
TRUE_REWARD = "rewards/true_reward/mean"
HEADLINES = ("reward", TRUE_REWARD, "objective/kl", "completions/mean_length") # What tells whether a run goes well


def find_metric(key: str, # With the prefix eval_ (or eval_SET_, of one of several sets) if an evaluation logged it
) -> Metric | None:
    "The entry of a log key, with the reward's name filled in; None for what a reward function logged itself."
    if key in METRICS: return METRICS[key]
    if reward := re.fullmatch("rewards/(.+)/(mean|std)", key):
        entry = METRICS[f"rewards/NAME/{reward[2]}"]
        return entry._replace(name=key, label=entry.label.replace("NAME", reward[1]))
    rest = key.removeprefix("eval_")
    if rest in ("", key): return None
    if found := find_metric(rest): return found._replace(name=key, label=f"eval {found.label}")
    return find_metric(f"eval_{rest.partition('_')[2]}")


def series(history: list[dict], # `trainer.state.log_history`
           key: str,
) -> list[float]:               # Oldest first
    "The values of a metric that are finite, as often as it was logged."
    return [entry[key] for entry in history if math.isfinite(entry.get(key, math.nan))]


def means(stats: list[dict[str, float]]) -> dict[str, float]: # Of entries that may lack some names
    "The mean of each metric over the entries in which it is a finite number; without those that never are."
    found = {name: series(stats, name) for name in dict.fromkeys(k for s in stats for k in s)}
    return {name: mean(values) for name, values in found.items() if values}


def before_after(history: list[dict], # `trainer.state.log_history`
                 batches: bool = True, # Without two evaluations: the means of the first and last tenth of the batches
) -> dict[str, tuple[float, float]]:   # By the headline's key
    "What a run changed: the first and the last evaluation's headlines."
    found = {}
    for key in HEADLINES:
        evaluated, trained = series(history, f"eval_{key}"), series(history, key)
        n = max(len(trained) // 10, 1)
        if len(evaluated) > 1: found[key] = evaluated[0], evaluated[-1]
        elif batches and trained: found[key] = mean(trained[:n]), mean(trained[-n:])
    return found
