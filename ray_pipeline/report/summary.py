"""The table at the end of a run: each stage's figure beside what it has to beat. Plain data in, text out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_pipeline.records.units import count_text, number_text, percent, seconds_text

STATUS_NAMES = {
    "done": "DONE",
    "learned_nothing": "LEARNED NOTHING",
    "failed": "FAILED",
    "reused": "REUSED",
    "running": "RUNNING",
    "interrupted": "INTERRUPTED",
    "pending": "NOT RUN",
}
_STYLES = {"DONE": "green", "REUSED": "cyan", "LEARNED NOTHING": "yellow", "FAILED": "red", "INTERRUPTED": "yellow"}


@dataclass(frozen=True)
class SummaryRow:
    """One stage: `figure` is what it reached, `against` what that is held against."""

    stage: str
    status: str
    figure: str
    against: str
    seconds: float | None
    folder: str


def summary_rows(stages: Sequence[Mapping[str, Any]], reused: frozenset[str] = frozenset()) -> list[SummaryRow]:
    """Rows from the stages of `ledger.read_status`; a finished stage in `reused` was not run this time.

    A reused stage that learned nothing keeps saying so.
    """
    rows = []
    for entry in stages:
        status = entry["status"]
        if status == "done" and entry["stage"] in reused:
            status = "reused"
        metrics, baselines = entry.get("metrics") or {}, entry.get("baselines") or {}
        seconds = entry.get("seconds") if "attempt" in entry else None
        rows.append(
            SummaryRow(
                entry["stage"],
                STATUS_NAMES[status],
                figure_text(entry["stage"], metrics),
                baseline_text(entry["stage"], baselines, metrics),
                seconds,
                entry.get("folder", ""),
            )
        )
    return rows


def interval_text(name: str, metrics: Mapping[str, float]) -> str:
    """`81.0% (76.2% to 85.1%)`, with its 95% bounds where they were measured."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    bounds = "" if low is None or high is None else f" ({percent(low)} to {percent(high)})"
    return percent(metrics[name]) + bounds


def figure_text(stage: str, metrics: Mapping[str, float]) -> str:
    """The stage's main figure."""
    if stage == "pretrain" and "validation_loss" in metrics:
        return f"validation loss {metrics['validation_loss']:.3f} nats{sources_text(metrics)}{experts_text(metrics)}"
    if "accuracy" in metrics:
        text = f"held-out accuracy {percent(metrics['accuracy'])}"
        if "preference_accuracy" in metrics:
            text = f"held-out preference accuracy {interval_text('preference_accuracy', metrics)}, {text}"
        if stage == "sft" and "validation_loss" in metrics:
            text += f", loss {metrics['validation_loss']:.3f} nats"
        if "params" in metrics:
            text += f", {count_text(metrics['params'])} parameters"
        return text
    refused = refused_exports(metrics)
    left_out = f"; refused: {', '.join(refused)}, of which rounding makes another model" if refused else ""
    agreement = [
        value for name, value in metrics.items()
        if name.endswith(".gguf/greedy_agreement") and name.partition("/")[0] not in refused
    ]  # fmt: skip
    if agreement:  # export: one per file
        checked = metrics.get("checks_passed", sum(name.endswith("/greedy_agreement") for name in metrics))
        return f"{checked:.0f} exports checked, GGUF greedy agreement {percent(min(agreement))} or more{left_out}"
    if "checks_passed" in metrics:
        native = any(name.startswith("native/") for name in metrics)
        form = " in this project's format (transformers has no such class)" if native else ""
        left = metrics.get("checks_not_run", 0.0)
        not_run = f", {left:.0f} GGUF not" if left else ""
        return f"{metrics['checks_passed']:.0f} exports checked{form}{not_run}{left_out}"
    first = list(metrics.items())[:3]
    return ", ".join(f"{name.replace('_', ' ')} {number_text(value)}" for name, value in first) + left_out_text(metrics)


def refused_exports(metrics: Mapping[str, float]) -> list[str]:
    """Files that EXPORT did not put in place."""
    return sorted(name.removesuffix("/refused") for name in metrics if name.endswith("/refused"))


def sources_text(metrics: Mapping[str, float], most: int = 6) -> str:
    """` (builtin 3.955, input 3.412)`: the loss of each source, where there are several."""
    each = {n.partition("/")[2]: value for n, value in metrics.items() if n.startswith("validation_loss/")}
    named = [f"{name} {value:.3f}" for name, value in list(each.items())[:most]]
    more = [f"and {len(each) - most} more"] if len(each) > most else []
    return f" ({', '.join(named + more)})" if named else ""


def left_out_text(metrics: Mapping[str, float]) -> str:
    """`; left out: 224 preference pairs too long`, of what the data held."""
    ends = ("_too_long", "duplicates", "contaminated", "_ties", "empty", "_left_out")
    said = {name: name.removesuffix("_left_out").replace("_", " ") for name in metrics}
    found = [f"{number_text(n)} {said[name]}" for name, n in metrics.items() if n and name.endswith(ends)]
    return f"; left out: {', '.join(found)}" if found else ""


def experts_text(metrics: Mapping[str, float]) -> str:
    """`; busiest expert 1.4x the mean, load entropy 0.98, 0 tokens dropped`, of the least even layer."""
    if "largest_load" not in metrics:
        return ""
    busiest, entropy, dropped = (metrics[name] for name in ("largest_load", "load_entropy", "dropped_tokens"))
    return f"; busiest expert {busiest:.1f}x the mean, load entropy {entropy:.2f}, {dropped:.0f} tokens dropped"


def baseline_text(stage: str, baselines: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    """What the figure is held against, in the same unit."""
    parts = []
    if "ln_vocab" in baselines:
        parts.append(f"ln V {baselines['ln_vocab']:.3f}")
    if "unigram_entropy" in baselines:
        parts.append(f"unigram entropy {baselines['unigram_entropy']:.3f}")
    if "input_loss" in baselines:
        owner = "input's loss" if stage == "sft" else "input"
        parts.append(f"{owner} {baselines['input_loss']:.3f}")
    if "predicted_loss" in baselines and "validation_loss" in metrics:
        expected = baselines["predicted_loss"]
        parts.append(f"predicted {expected:.3f} ({metrics['validation_loss'] / expected - 1:+.1%})")
    if "predicted_loss_elsewhere" in baselines:
        parts.append(f"no verdict on the predicted {baselines['predicted_loss_elsewhere']:.3f}: it is of another text")
    preferences = _input_text("preference_accuracy", baselines, metrics)
    accuracy = _input_text("accuracy", baselines, metrics)
    if preferences:
        parts.append(f"input's preference {preferences}")
    if accuracy:
        parts.append(f"input {accuracy}")
    if "teacher_accuracy" in baselines:
        size = f", {count_text(metrics['teacher_params'])} parameters" if "teacher_params" in metrics else ""
        parts.append(f"teacher {percent(baselines['teacher_accuracy'])}{size}")
    return "; ".join(parts)


def _input_text(name: str, baselines: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    """`20.0% (+41.0 points)`: the figure of the stage's input, and what was gained over it."""
    before = baselines.get(f"input_{name}")
    if before is None:
        return ""
    return percent(before) + (f" ({100 * (metrics[name] - before):+.1f} points)" if name in metrics else "")


def print_summary(console: Console, rows: Sequence[SummaryRow], run_dir: Path) -> None:
    """The table, then where the outputs are."""
    table = Table(title=f"run {run_dir.name}", title_justify="left", title_style="bold", expand=False)
    for name in ("stage", "status", "reached", "held against"):
        table.add_column(name, overflow="fold")
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("outputs", overflow="fold")
    for row in rows:
        seconds = "" if row.seconds is None else seconds_text(row.seconds)
        status = Text(row.status, style=_STYLES.get(row.status, "dim"))
        where = Path(row.folder).name if row.folder and row.status != "NOT RUN" else ""
        table.add_row(row.stage, status, row.figure, row.against, seconds, where)
    console.print(table)
    console.print(f"Outputs are in {run_dir}", highlight=False, markup=False, soft_wrap=True)
