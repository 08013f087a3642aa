"""What a run says before, between and after its stages. Plain data in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ray_pipeline.dag.ledger import Record
from ray_pipeline.dag.plan import PlannedStage
from ray_pipeline.errors import StageFailed, command
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.rank_output import printed
from ray_pipeline.records.units import seconds_text
from ray_pipeline.report.summary import STATUS_NAMES, baseline_text, figure_text
from ray_pipeline.settings.run_folder import ERROR_LOG

_STYLES = {"run": "bold", "resume": "bold yellow", "reuse": "cyan", "skip": "dim"}


def memory_text(size: int) -> str:
    """`1.2 GB`"""
    return f"{size / 1e9:.1f} GB"


def print_plan(console: Console, rows: Sequence[PlannedStage], run_dir: Path, layout: Layout) -> None:
    """Stage, what will happen, why, ranks, estimated memory."""
    table = Table(title=f"plan of run {run_dir.name} ({layout.describe()})", title_justify="left", title_style="bold")
    for name in ("stage", "will", "why"):
        table.add_column(name, overflow="fold")
    table.add_column("ranks", justify="right")
    table.add_column("memory per rank, about", justify="right")
    for row in rows:
        runs = row.action in ("run", "resume")
        ranks, memory = (str(row.ranks), memory_text(row.estimated_memory_bytes)) if runs else ("", "")
        table.add_row(row.stage, Text(row.action, style=_STYLES[row.action]), row.reason, ranks, memory)
    console.print(table)


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Plain lines below the plan."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def outcome_text(record: Record) -> str:
    """A finished stage's line: `DONE in 12 s  held-out accuracy 61.0%  (input 20.0% (+41.0 points))`."""
    text = f"{STATUS_NAMES[record.status]} in {seconds_text(record.seconds)}"
    figure = figure_text(record.stage, record.metrics)
    against = baseline_text(record.stage, record.baselines, record.metrics)
    return text + (f"  {figure}" if figure else "") + (f"  ({against})" if against else "")


def print_failure(console: Console, row: PlannedStage, failure: StageFailed) -> None:
    """The cause in a few lines, where the whole traceback is, and how to go on."""
    cause = "\n".join(str(failure).splitlines()[:4])
    log = row.work / ERROR_LOG
    resume = command("resume", row.folder.parent)
    text = f"{row.stage} FAILED: {cause}\nWhole traceback: {log}\nGo on with: {resume}"
    if logs := printed(row.work):
        text += f"\nWhat it printed: {', '.join(map(str, logs[:4]))}" + (" ..." if len(logs) > 4 else "")
    if row.replaces:
        text += f"\nThe finished {row.stage} of before is still there. To stay with it: rm -r {row.work}"
    console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
