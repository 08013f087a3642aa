"""A sweep's table in the terminal, and as a page with its plot (`templates/sweep.html`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_pipeline.evaluation.seed_statistics import POWER
from ray_pipeline.records.units import seconds_text
from ray_pipeline.report.page_files import page
from ray_pipeline.report.run_facts import embedded
from ray_pipeline.report.sweep_result import SettingRow, SweepResult

TITLE = "Sweep "  # how the page's title begins
STYLES = {"best": "bold green", "worse": "red", "not told apart": "yellow"}
HEADS = ("mean", "95% interval", "seeds", "against the best", "seen from", "verdict", "time")


def heads(result: SweepResult) -> tuple[str, ...]:
    """The table's columns: a setting's number and values, then `HEADS`."""
    return "", *(result.rows[0].values if result.rows else ()), *HEADS


def cells(result: SweepResult, row: SettingRow) -> tuple[str, ...]:
    """The table's row, by `heads`."""
    mean, test = row.mean, row.test
    interval = difference = seen = ""
    if mean is not None and mean.low is not None and mean.high is not None:
        interval = f"{result.value(mean.low)} to {result.value(mean.high)}"
    if test is not None:
        bounds = (result.value(bound, difference=True) for bound in (test.low, test.high))
        difference = f"{result.value(test.difference, difference=True)} [{', '.join(bounds)}]"
        seen = result.value(test.detectable, difference=True).lstrip("+")
    done = sum(trial.status == "done" for trial in row.trials)
    seeds = f"{done} of {len(row.trials)}" + (f", {row.failed} FAILED" if row.failed else "")
    seconds = sum(trial.seconds for trial in row.trials)
    return (
        str(row.number), *row.values.values(), "" if mean is None else result.value(mean.value), interval, seeds,
        difference, seen, row.verdict, seconds_text(seconds) if seconds else "",
    )  # fmt: skip


def notes(result: SweepResult) -> list[str]:
    """What has to be known to read the table."""
    out = []
    tests = [row.test for row in result.rows if row.test is not None]
    if len(result.seeds) < 2:
        out.append("One seed: nothing tells a difference from chance. Use --seeds 3 or more.")
    elif tests:
        over = f" over all {len(tests)} tests (Holm)" if len(tests) > 1 else ""
        out.append(
            "Against the best: mean difference on the same seeds, its 95% interval (paired t); the verdict is at "
            f"5%{over}. Seen from: the true difference that {len(result.seeds)} seeds show in {POWER:.0%} of all "
            "cases, with the spread seen here; smaller ones may be there all the same."
        )
    odd = [
        f"{note}: {', '.join(trial.run for trial in result.trials if trial.note == note)}"
        for note in dict.fromkeys(trial.note for trial in result.trials if trial.note)
    ]
    failed = [f"{trial.run} FAILED: {trial.reason.splitlines()[0]}" for trial in result.trials if trial.reason]
    waiting = [trial.run for trial in result.trials if trial.status == "not run"]
    if waiting:
        out.append(f"Not run: {', '.join(waiting[:6])}" + (f" and {len(waiting) - 6} more" if len(waiting) > 6 else ""))
    return out + odd + failed


def print_sweep(console: Console, result: SweepResult) -> None:
    """The table and its notes."""
    table = Table(title=f"{result.title} after {result.stage}", title_justify="left", title_style="bold")
    for name in heads(result):
        table.add_column(name, overflow="fold")
    for row in result.rows:
        table.add_row(*map(Text, cells(result, row)), style=STYLES.get(row.verdict, ""))
    console.print(table)
    for text in notes(result):
        console.print(
            text, style="red" if " FAILED: " in text else "dim", markup=False, highlight=False, soft_wrap=True
        )


def render_sweep(result: SweepResult) -> str:
    """The page."""
    return page(
        "sweep.html",
        title=TITLE + result.folder.name,
        result=result,
        heads=heads(result),
        rows=[(row, cells(result, row)) for row in result.rows],
        notes=notes(result),
        plots=[{"title": result.title, "note": "a point a seed; a bar the 95% interval of the mean"}]
        + [
            {"title": f"{result.title} by {name}", "note": "a point the mean of a setting"}
            for name in numeric_axes(result)
        ],
        drawings=embedded({"charts": [_by_setting(result), *(_by_value(result, n) for n in numeric_axes(result))]}),
    )


def numeric_axes(result: SweepResult) -> list[str]:
    """Axes whose values are all numbers, three different ones at least."""
    names = result.rows[0].values if result.rows else {}
    out = []
    for name in names:
        numbers = {_number(row.values[name]) for row in result.rows}
        if None not in numbers and len(numbers) > 2:
            out.append(name)
    return out


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _by_setting(result: SweepResult) -> dict[str, Any]:
    """Each seed's figures over the settings' numbers, and the intervals of the means."""
    rows: Sequence[SettingRow] = result.rows
    figures = [{trial.seed: trial.figure for trial in row.trials} for row in rows]
    return {
        "x": [row.number for row in rows],
        "names": [row.text for row in rows],
        "log": False,
        "series": [{"name": f"seed {seed}", "values": [found.get(seed) for found in figures]} for seed in result.seeds],
        "means": [row.mean and row.mean.value for row in rows],
        "intervals": [
            None if row.mean is None or row.mean.low is None else [row.mean.low, row.mean.high] for row in rows
        ],
    }


def _by_value(result: SweepResult, name: str) -> dict[str, Any]:
    """Means over the values of an axis, on a logarithmic scale where they span more than a power of ten."""
    pairs = [(float(row.values[name]), row) for row in result.rows if row.mean is not None]
    pairs.sort(key=lambda pair: pair[0])
    numbers = [number for number, _ in pairs]
    return {
        "x": numbers,
        "names": [row.text for _, row in pairs],
        "log": bool(numbers) and numbers[0] > 0 and numbers[-1] >= 10 * numbers[0],
        "series": [],
        "means": [row.mean and row.mean.value for _, row in pairs],
        "intervals": [None for _ in pairs],
    }
