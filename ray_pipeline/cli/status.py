"""`status`: where a run stands, read from its folder. Starts no Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.runs import find_run, latest_run, output_dir

if TYPE_CHECKING:
    from rich.table import Table

STYLES = {
    "done": "green",
    "running": "cyan",
    "interrupted": "yellow",
    "learned_nothing": "red",
    "failed": "red",
    "pending": "dim",
}


@click.command()
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def status(run: str | None, as_json: bool, **options: str | None) -> int:
    """Show the stages of RUN (default: the latest): progress, figures, baselines, seconds, digests and outputs."""
    from ray_pipeline.dag.ledger import read_status

    folder = output_dir(options["output_dir"])
    run_dir = find_run(run, folder) if run else latest_run(folder)
    facts = read_status(run_dir)
    facts["cost"] = cost_text(run_dir, facts["stages"])
    if as_json:
        click.echo(json.dumps(facts, indent=2))
    else:
        show(facts)
    return 0


def cost_text(run_dir: Path, stages: list[dict[str, Any]]) -> str | None:
    """What the run has cost so far; None where no price is known."""
    from ray_pipeline.cli.options import Request
    from ray_pipeline.costs.prices import spent_text
    from ray_pipeline.errors import UserError

    try:
        return spent_text(Request(None, {}, None).load_stored(run_dir), stages)
    except UserError:  # of settings that are damaged, or of another version
        return None


def show(facts: dict[str, Any]) -> None:
    """Print the run as a table with the outputs below it."""
    from rich.console import Console

    from ray_pipeline.records.guard_file import interventions_text

    console = Console(width=None if Console().is_terminal else 150)
    holder = facts["worked_on_by"]
    at_work = f", process {holder['pid']} on {holder['host']} is working on it" if holder and "pid" in holder else ""
    console.print(f"run {facts['run']}{at_work}", style="bold", highlight=False)
    console.print(table(facts["stages"]))
    if facts.get("cost"):
        console.print(facts["cost"], highlight=False, markup=False)
    # Paths and errors stand below the table: a table would cut or wrap them.
    for stage in facts["stages"]:
        if stage.get("error"):
            log = f" (log: {stage['error_log']})" if stage.get("error_log") else ""
            console.print(f"{stage['stage']} failed: {stage['error']}{log}", style="red", markup=False, soft_wrap=True)
    for stage in facts["stages"]:
        for text in interventions_text(stage.get("guards", [])):
            console.print(f"{stage['stage']}: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    for text in (text for stage in facts["stages"] for text in stage.get("damaged", [])):
        console.print(text, style="red", markup=False, highlight=False, soft_wrap=True)
    for stage in facts["stages"]:
        if "folder" in stage:
            console.print(f"{stage['stage']:<13}{stage['folder']}", style="dim", highlight=False, soft_wrap=True)


def table(stages: list[dict[str, Any]]) -> Table:
    """One row a stage."""
    from rich.table import Table

    from ray_pipeline.records.progress import progress_text
    from ray_pipeline.records.units import seconds_text

    out = Table(box=None, pad_edge=False)
    for name in ("stage", "status", "progress", "figures", "baselines", "time", "weights"):
        out.add_column(name, overflow="fold")
    for stage in stages:
        state, progress = stage["status"], stage.get("progress")
        finished = state in ("done", "learned_nothing")
        shown = "" if finished or not progress else progress_text(progress)
        if "again" in stage:
            shown = rerun_text(stage["again"])
        out.add_row(
            stage["stage"],
            f"[{STYLES.get(state, '')}]{state.replace('_', ' ')}[/]",
            shown,
            figures(stage.get("metrics")),
            figures(stage.get("baselines")),
            seconds_text(stage["seconds"]) if stage.get("seconds") else "",
            (stage.get("weights_digest") or "")[:12],
        )
    return out


def rerun_text(again: dict[str, Any]) -> str:
    """`new attempt interrupted: step 3/10`: of a finished stage that is run again."""
    from ray_pipeline.records.progress import progress_text

    what = again["error"].splitlines()[0] if again["error"] else progress_text(again["progress"] or {})
    return f"new attempt {again['status']}: {what}"


def figures(values: dict[str, float] | None) -> str:
    """`accuracy 0.873` a line."""
    from ray_pipeline.records.units import number_text

    return "\n".join(f"{name} {number_text(value)}" for name, value in (values or {}).items())
