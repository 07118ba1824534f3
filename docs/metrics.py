"""The table of all metrics: python docs/metrics.py prints it."""
from rlhf_nb.metrics import METRICS

INTRO = """# Metrics

What a run logs: the keys of `trainer.state.log_history`, and of TensorBoard, wandb and trackio. The names are TRL's
where TRL has the number. Evaluations log with the prefix `eval_`.
"""


def metrics_table() -> str:
    "A Markdown page with one row per metric."
    rows = ["| key | meaning | unit | what to expect | logged |", "| --- | --- | --- | --- | --- |"]
    for entry in METRICS.values():
        when = ["also as `eval_`"] * entry.evaluated + [entry.only] * bool(entry.only)
        rows.append(f"| `{entry.name}` | {entry.meaning} | {entry.unit} | {entry.healthy} | {'; '.join(when)} |")
    return INTRO + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__": print(metrics_table())
