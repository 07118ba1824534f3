"""The report: one HTML file from what runs left in their folders."""
import html
import io
import os
import re
from collections.abc import Callable
from dataclasses import fields
from difflib import SequenceMatcher
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.style import context

from .checkpoint import checkpoints
from .config import PPOConfig, is_default
from .data import parse_json, read_text
from .diagnosis import RULES, Finding, diagnose
from .hub import DEFAULTS, HIDDEN, without_paths
from .metrics import HEADLINES, METRICS, TRUE_REWARD, before_after, find_metric, series
from .report import TEMPLATES, Chart, draw, plain, values_of
from .tables import table

TABLES = table("report")
COLORS, LINES = TABLES["colors"], TABLES["lines"]
REWARD, _, KL, _ = HEADLINES
COLUMNS = {REWARD: "reward", TRUE_REWARD: "true_reward"} # Of the completions


class Run(NamedTuple):
    "A run, as read from its folder."
    name: str
    history: list[dict]          # `trainer.state.log_history`
    done: int                    # Updates
    planned: int                 # `max_steps`
    about: dict[str, dict]       # Settings, model, data, machine, versions, as far as known
    before: pd.DataFrame | None  # Completions of the validation prompts at the first evaluation
    after: pd.DataFrame | None   # At the last, the same rows; both None: there are no two

    @property
    def settings(self) -> dict[str, Any]:
        "Return every setting by name; empty where the run left none."
        return self.about.get("settings", {})


def read_each(folder: Path, name: str) -> list[dict]:
    "Read a file of a run, and the file of that name in its newest checkpoint, where they are."
    paths = [place/name for place in (folder, *checkpoints(folder)[-1:])]
    return [parse_json(read_text(path), str(path)) for path in paths if path.exists()]


def read_state(folder: Path) -> dict: # transformers' `TrainerState`
    "Read the newest state of a run, which may lie in its newest checkpoint; `ValueError` if there is none."
    states = read_each(folder, "trainer_state.json")
    trained = [state for state in states if series(state.get("log_history", []), REWARD)]
    if trained: return max(trained, key=lambda state: state["global_step"])
    raise ValueError(f"{folder} holds no run: no trainer_state.json there or in its newest checkpoint has a reward")


def read_completions(path: Path) -> pd.DataFrame:
    "Read a table of completions; `ValueError` with the path if it is damaged or of another kind."
    try: table = pd.read_parquet(path)
    except ValueError as e: raise ValueError(f"{path} is damaged: {e}") from None
    missing = {"prompt", "completion", "reward"} - {*table.columns}
    if missing: raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
    return table


def read_run(output_dir: str | Path) -> Run:
    "Read what a run left, without paths of the machine, as a report is made to be sent; `ValueError` if there is none."
    folder = Path(output_dir)
    state, places = read_state(folder), (folder/"completions").glob("eval_*.parquet")
    steps = {int(path.stem[5:]): path for path in places if path.stem[5:].isdecimal()} # Not of one of several sets
    tables = [steps[step] for step in sorted(steps) if step <= state["global_step"]]
    after = read_completions(tables[-1]) if tables else None
    before = next((table for table in map(read_completions, tables[:-1]) if table.prompt.equals(after.prompt)), None)
    about = without_paths(next(iter(read_each(folder, "run.json")), {}))
    return Run(name=folder.resolve().name, history=state["log_history"], done=state["global_step"],
               planned=state["max_steps"], about=about, before=before, after=None if before is None else after)


def number(x: float) -> str:
    "Write three digits, and no exponent for large numbers."
    return f"{x + 0:,.0f}" if abs(x) >= 100 or x == 0 else f"{x:.3g}"


def duration(seconds: float) -> str:
    "Write a time in a unit that suits it."
    size, unit = (3600, "h") if seconds >= 7200 else (60, "min") if seconds >= 120 else (1, "s")
    return f"{seconds / size:.{int(seconds < 10 * size)}f} {unit}"


def phases(history: list[dict]) -> dict[str, float]: # Seconds of the whole run, by phase
    "Sum the time of rollout, score and step; evaluation and saving are not in it."
    found = {}
    for key in ("time/rollout", "time/score", "time/step"):
        steps, seconds = values_of(history, "step", key).T
        # An entry is a mean over the updates since the one before
        if len(steps): found[METRICS[key].label] = float(np.diff(steps, prepend=0) @ seconds)
    return found


def verdict(run: Run) -> str:
    "Say what became of a run, in one sentence."
    return TEMPLATES.get_template("verdict.txt").render(globals(), run=run) # Calls functions of this module


STYLE = files("rlhf_nb.templates")/"report.mplstyle"
NO_METADATA = dict.fromkeys(("Creator", "Date", "Format", "Type"))


def color(i: int) -> str:
    "Return the colour of the i-th run, on light."
    return [*COLORS][i % len(COLORS)]


def line_style(i: int) -> dict[str, Any]:
    "Return the colour and the dashes of the i-th run, for matplotlib."
    return dict(color=color(i), ls=(0, LINES[i % len(LINES)]))


TO_PAGE = TABLES["to_page"] | {c: f"var(--c{i})" for i, c in enumerate(COLORS)}


def inline(svg: str,   # As matplotlib writes it; ids that are referred to are of its own
           label: str, # Says the same to a reader who cannot see it
) -> Markup:
    "Make a picture part of a page: its font and colours are the page's."
    for pattern, by in TO_PAGE.items(): svg = re.sub(pattern, by, svg, flags=re.DOTALL)
    for name in {*re.findall(' id="([^"]+)"', svg)} - {*re.findall(r"#(\w+)", svg)}:
        svg = svg.replace(f' id="{name}"', "")
    return Markup(svg.replace('role="img"', f'role="img" aria-label="{html.escape(label)}"', 1))


def picture(paint: Callable[[Axes], None], # Draws
            label: str, name: str,         # The name is one of its own in the page
            size: tuple[float, float] = (2.9, 1.75), # Width and height in inches at a font of 8 points
) -> Markup:
    "Draw what `paint` draws, as part of a page."
    with context([STYLE, {"svg.hashsalt": name}]): # Ids depend on the name
        figure, file = Chart(figsize=size, layout="constrained"), io.StringIO()
        axis = figure.subplots()
        paint(axis)
        axis.grid(alpha=.12, color="black")
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)
    return inline(file.getvalue(), label)


def curve_keys(runs: list[Run]) -> list[str]:
    "Choose what has a panel: whatever changed in a run; single rewards where several make up the reward."
    counts = [pd.DataFrame(run.history).nunique() for run in runs]
    changed = dict.fromkeys(key for count in counts for key, n in count.items() if n > 1)
    single = [key for key in changed if re.fullmatch("rewards/.+/mean", key) and key != TRUE_REWARD]
    keys = [*HEADLINES, *(single if len(single) > 1 else []), *TABLES["more"]]
    return [key for key in keys if key in changed or f"eval_{key}" in changed]


def in_words(run: Run, key: str) -> str:
    "Say where a metric began and where it ended."
    kinds = {"": series(run.history, key), "validation ": series(run.history, f"eval_{key}")}
    return f"{run.name}: " + ", ".join(f"{kind}{number(x[0])} to {number(x[-1])}" for kind, x in kinds.items() if x)


def curve_panels(runs: list[Run]) -> dict[str, Markup]: # Title to picture
    "Draw every metric over PPO updates, runs one over the other."
    def paint(axis: Axes):
        for i, run in enumerate(runs):
            target = run.settings["adap_kl_target"] if key == KL and run.settings.get("adap_kl_ctrl") else None
            points = "black" if len(runs) == 1 else color(i)
            draw(axis, run.history, key, kl_target=target, points=points, **line_style(i))
    panels = {}
    for key in curve_keys(runs):
        title = find_metric(key).title
        label = f"{title} over PPO updates. " + "; ".join(in_words(run, key) for run in runs)
        panels[title] = picture(paint, label, f"curve-{key}")
    return panels


def pairs(history: list[dict], x: str, y: str, most: int = 200) -> np.ndarray: # step, x and y, (n, 3)
    "Return two metrics of the same entries; of more than `most` entries, means of neighbours."
    rows = values_of(history, "step", x, y)
    return np.array([part.mean(0) for part in np.array_split(rows, min(most, len(rows)))]) if len(rows) else rows


def kl_panels(runs: list[Run]) -> dict[str, Markup]: # Title to picture
    "Draw reward, and true reward where known, against KL (Gao et al. 2023, Stiennon et al. 2020)."
    def paint(axis: Axes):
        for i, batches in known.items():
            axis.scatter(*batches.T[1:], s=10, color=color(i), alpha=np.linspace(.12, .6, len(batches)), lw=0)
            evaluated = pairs(runs[i].history, f"eval_{KL}", f"eval_{key}")
            axis.plot(*evaluated.T[1:], marker="o", ms=4, lw=1.2, **line_style(i))
            ends = [*evaluated[:1], *evaluated[-1:]] if len(runs) == 1 else []
            for step, *at in ends: axis.annotate(f"{step:.0f}", at, (6, -9), textcoords="offset points")
        axis.set(xlabel=METRICS[KL].title, ylabel=title)
    panels = {}
    for key in COLUMNS:
        title, words = METRICS[key].title, []
        known = {i: found for i, run in enumerate(runs) if len(found := pairs(run.history, KL, key))}
        for i, batches in known.items():
            places = [f"{number(y)} at {number(x)}" for _, x, y in batches[[0, -1]]]
            words.append(f"{runs[i].name}: {', later '.join(places)}")
        label = f"{title} against KL in training batches. {'; '.join(words)}"
        if known: panels[title] = picture(paint, label, f"kl-{key}", (3.5, 2.3))
    return panels


def finite(x: pd.Series) -> np.ndarray:
    "Leave out the rows to which a reward does not apply."
    return x[np.isfinite(x.astype(float))].to_numpy(float)


def rewards(run: Run, column: str) -> list[pd.Series]: # Before and after; empty: not known
    "Return a reward of the validation prompts."
    if run.after is None or column not in run.after: return []
    return [run.before[column], run.after[column]]


def histograms(runs: list[Run]) -> dict[str, Markup]: # Caption to picture
    "Draw the rewards of the validation prompts before and after, with the same bins in every run."
    panels = {}
    for key, column in COLUMNS.items():
        title = METRICS[key].title
        known = {i: [*map(finite, rewards(run, column))] for i, run in enumerate(runs)}
        sides = sum(known.values(), [])
        edges = np.histogram_bin_edges(np.concatenate([[], *sides]), 24)
        most = max((np.histogram(x, edges)[0].max() for x in sides), default=0)
        def paint(axis: Axes):
            axis.hist(both, edges, histtype="stepfilled", color=["gray", color(i)], alpha=.6)
            axis.set(ylim=(0, most * 1.05), xlabel=title, ylabel="completions")
        for i, both in known.items():
            if not both or not all(map(len, both)): continue
            before, after = [number(x.mean()) for x in both]
            words = f"{title}: mean {before} before, {after} after"
            if len(runs) > 1: words = f"{runs[i].name}, {words}"
            panels[words] = picture(paint, f"Histogram. {words}", f"histogram-{key}-{i}", (3.5, 1.9))
    return panels


CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff"
PIECE = re.compile(f"[{CJK}]|[^\\W{CJK}]+|\\s+|[^\\w\\s]")
MOST_PAIRS = 200_000 # Of pieces that are compared; a repetitive completion makes each pair a match


def marked(before: str, after: str) -> tuple[Markup, Markup]: # Escaped
    "Mark what is gone, in <del>, and what is new, in <ins>: words, and characters in scripts without spaces."
    a, b = PIECE.findall(before), PIECE.findall(after)
    codes = [("replace", 0, len(a), 0, len(b))]
    if len(a) * len(b) <= MOST_PAIRS: codes = SequenceMatcher(None, a, b, autojunk=False).get_opcodes()
    texts = [(kind != "equal", "".join(a[i:j]), "".join(b[k:m])) for kind, i, j, k, m in codes]
    size = [max(len(old), len(new)) if changed else 0 for changed, old, new in texts] + [0]
    marks = {"del": Markup(), "ins": Markup()}
    for n, (changed, *both) in enumerate(texts):
        # What stayed between two longer changes counts as changed: else texts with little in common fall to pieces
        changed = changed or len(both[0]) <= min(size[n - 1], size[n + 1])
        for tag, text in zip(marks, both):
            marks[tag] += Markup("<{0}>{1}</{0}>").format(tag, text) if changed and text else text
    return tuple(text.replace(f"</{tag}><{tag}>", "") for tag, text in marks.items())


LONGEST = 2000 # Characters of a text on the page


def chosen(run: Run) -> dict[int, str]: # Row to why
    "Choose the rows to show: best, worst and quartiles of the change in reward; greatest loss in true reward."
    gained, true = gains(run, "reward"), gains(run, "true_reward")
    order = gained.sort_values(ascending=False, kind="stable").index
    last = "Greatest loss in reward" if (gained < 0).any() else "Least gain in reward"
    places = ("Greatest gain in reward", "Upper quartile", "Median", "Lower quartile", last) if len(order) else ()
    found = {}
    for i, why in enumerate(places): found.setdefault(order[round(i / 4 * (len(order) - 1))], why)
    if (true < 0).any(): found.setdefault(true.idxmin(), "Greatest loss in true reward")
    return found


def gains(run: Run, column: str) -> pd.Series:
    "Compute what each completion gained, where that is known."
    both = rewards(run, column)
    return (both[1] - both[0]).dropna() if both else pd.Series(dtype=float)


class Setting(NamedTuple):
    "A setting of a run, or of several."
    name: str
    values: list       # One for each run; empty text: it left none
    default: Any
    help: str

    @property
    def changed(self) -> bool:
        "Is it not the default, in the first run?"
        return not is_default(self.values[0], self.default)

    @property
    def differs(self) -> bool:
        "Is it not the same in all runs?"
        return any(value != self.values[0] for value in self.values)


def setting_rows(runs: list[Run]) -> list[Setting]:
    "Return every setting that a run left, in the order of `PPOConfig`; of unsupported ones and places there are none."
    left = dict.fromkeys(name for run in runs for name in run.settings)
    helps = {f.name: f.metadata["help"] for f in fields(PPOConfig)}
    return [Setting(name, [run.settings.get(name, "") for run in runs], DEFAULTS.get(name, ""), helps.get(name, ""))
            for name in DEFAULTS | left if name in left and name not in HIDDEN]


def costs(runs: list[Run]) -> list[dict[str, tuple[float, float, float]]]: # By phase
    "Compute seconds of an update, their share, and the share of the slowest run's; empty without times."
    found = [{phase: seconds / run.done for phase, seconds in phases(run.history).items()} for run in runs]
    for spent in found:
        if spent: spent["together"] = sum(spent.values())
    most = max(spent.get("together", 0) for spent in found)
    return [{phase: (x, x / spent["together"], x / most) for phase, x in spent.items()} for spent in found]


def ends(runs: list[Run]) -> pd.DataFrame: # A row for each run; NaN: not known
    "Return what the runs came to."
    rows = []
    for run in runs:
        known = {METRICS[key].title: after for key, (_, after) in before_after(run.history).items()}
        seconds = sum(phases(run.history).values()) or np.nan
        rows.append(known | dict(updates=run.done, seconds=seconds))
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def headline(runs: list[Run]) -> str:
    "Write the verdict on one run, or which of several is first in what."
    return TEMPLATES.get_template("headline.txt").render(globals(), runs=runs)


def page(runs: list[Run],
         findings: list[list[Finding] | None], # What a diagnosis of each run found; None: it could not be made
) -> str:                                      # HTML
    "Write the page of one run, or of several compared."
    if len(findings) != len(runs): raise ValueError(f"findings has {len(findings)} entries for {len(runs)} runs")
    template = TEMPLATES.get_template("report.html")
    return template.render(globals(), runs=runs, findings=findings, rules=RULES, plain=plain)


def findings_of(run: Run) -> list[Finding] | None: # None: its settings are not known
    "Diagnose a run; a setting that it does not know is at its default."
    return diagnose(run.history, DEFAULTS | run.settings) if run.settings else None


def write_report(output_dirs: list[str | Path], # Folders of runs
                 to: str | Path,                # The file; its folder is made
) -> Path:
    "Read the runs and write their page; `ValueError` for a folder without one."
    folders, to = [Path(d).resolve() for d in output_dirs], Path(to)
    twice = [d for d in folders if folders.count(d) > 1]
    if twice: raise ValueError(f"{twice[0]} is named twice")
    common = Path(os.path.commonpath([d.parent for d in folders]))
    runs = [read_run(d)._replace(name=d.relative_to(common).as_posix()) for d in folders]
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text(page(runs, [*map(findings_of, runs)]), encoding="utf-8")
    return to
