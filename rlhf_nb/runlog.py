"""What a run notes between two log entries: metrics, seconds, completions, and who shows them."""
import time
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import gather_object
from transformers import TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import CallbackHandler

from .callbacks import CompletionsCallback, completions_table
from .config import PPOConfig
from .diagnosis import Doctor
from .metrics import means
from .report import make_view
from .rewards import Scores
from .rollout import Rollout

COUNTERS = ("learning_rate", "episode", "objective/kl_coef", "val/skipped_updates", "num_tokens")


class RunLog:
    "Owns the metrics since the last log entry, the seconds of the verbs, and this call's losses."

    def __init__(self, args: PPOConfig, completions: CompletionsCallback):
        self.args, self.completions = args, completions
        self.pending: list[dict[str, float]] = []  # One of each update since the last entry
        self.seconds: dict[str, float] = {}        # Of the verbs in the update at hand
        self.losses: list[float] = []              # Of this call of train()

    @contextmanager
    def timed(self, verb: str) -> Iterator[None]:
        "Add the seconds inside to those of the verb."
        start = time.perf_counter()
        try: yield
        finally: self.seconds[verb] = self.seconds.get(verb, 0.) + time.perf_counter() - start

    @contextmanager
    def untimed(self) -> Iterator[None]:
        "Keep the seconds of the update at hand as they are."
        seconds, self.seconds = self.seconds, {}
        try: yield
        finally: self.seconds = seconds

    def add(self, stats: dict[str, float], tokens: int): # Metrics of an update, and the tokens that it generated
        "Note an update with the seconds of its verbs."
        total = sum(self.seconds.values())
        times = {f"time/{verb}": seconds for verb, seconds in self.seconds.items()}
        self.pending.append(stats | times | dict(step_time=total, tokens_per_second=tokens / total))
        if "loss" in stats: self.losses.append(stats["loss"])
        self.seconds = {}

    def take(self) -> dict[str, float]: # Empty if there is nothing new
        "Means since the last entry; of counters, the newest. They count as logged."
        pending, self.pending = self.pending, []
        return means(pending) | {name: pending[-1][name] for name in COUNTERS} if pending else {}

    def keep(
        self, kind: str, mine: tuple[Rollout, Scores], everything: tuple[Rollout, Scores], step: int
    ):  # "completions", "eval", "eval_SET"
        "Keep the completions of all processes for the next log entry, and for whoever shows them."
        if not self.args.log_completions and self.args.disable_tqdm: return
        whole, judged = everything
        if self.args.world_size > 1: whole, judged = with_texts(*mine, whole, judged)
        if self.args.process_index == 0:
            self.completions.note(kind, completions_table(whole, judged, step), self.completions.numbers)


def with_texts(rollout: Rollout, scores: Scores, whole: Rollout, judged: Scores) -> tuple[Rollout, Scores]:
    "Rows, prompts, texts and extra columns of all processes, beside their tensors."
    extra = [{name: values[i] for name, values in scores.extra.items()} for i in range(len(rollout.rows))]
    texts = gather_object([*zip(rollout.rows, rollout.prompts, rollout.completions, extra)])[:len(judged.total)]
    rows, prompts, completions, extra = map(list, zip(*texts))
    names = dict.fromkeys(name for given in extra for name in given)
    columns = {name: [given.get(name) for given in extra] for name in names}
    return whole._replace(rows=rows, prompts=prompts, completions=completions), judged._replace(extra=columns)


def add_views(handler: CallbackHandler, args: PPOConfig, main: bool) -> CompletionsCallback: # Is this the main process?
    "Show our view in place of the base class's bar, keep completions, write TensorBoard's events to output_dir/trl."
    completions = CompletionsCallback(handler.callbacks)
    handler.callbacks.pop() # The progress bar, which the base class has added last
    for callback in handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = f"{args.output_dir}/trl"
    handler.add_callback(completions)
    if main and not args.disable_tqdm: handler.add_callback(make_view(lambda: completions.samples(args)))
    if main: handler.add_callback(Doctor())
    return completions


def wanted_metric(args: PPOConfig, metrics: dict[str, float]) -> float:
    "The metric that `metric_for_best_model` names; `ValueError` if evaluation does not measure it."
    name = f"eval_{args.metric_for_best_model.removeprefix('eval_')}"
    if name in metrics: return metrics[name]
    raise ValueError(
        f"metric_for_best_model={args.metric_for_best_model}: evaluation measures {', '.join(sorted(metrics))}"
    )


def note_best(state: TrainerState, args: PPOConfig, metrics: dict[str, float]) -> bool:
    "Is this the best evaluation so far? The state keeps it."
    if args.metric_for_best_model is None: return False
    value, best = wanted_metric(args, metrics), state.best_metric
    if best is not None and not (value > best if args.greater_is_better else value < best): return False
    state.best_metric, state.best_global_step = value, state.global_step
    return True
