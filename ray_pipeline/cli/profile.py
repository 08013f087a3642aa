"""`profile`: where the time of a training step goes, measured on a copy of a run's stage."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ray_pipeline.cli.options import axis_options, take_request
from ray_pipeline.cli.runs import find_run, output_dir

# Title of a row, and the names of spans it sums up.
ROWS = (
    ("next batch", ("next batch",)),
    ("forward", ("F",)),
    ("backward", ("B", "I", "W")),
    ("waiting for another pipeline rank", ("wait",)),
    ("optimizer step", ("optimizer step",)),
)


@click.command()
@click.argument("run")
@click.option("--stage", help="A training stage. Default: the last that has begun.")
@click.option(
    "--step", type=click.IntRange(1, 10**9), help="Which step, from 1. Default: behind the newest checkpoint."
)
@click.option("--steps", type=click.IntRange(1, 20), default=1, show_default=True, help="Steps in a row to profile.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write. Default: RUN/profiles/STAGE-step-N.")
@axis_options
@click.option("--backend", metavar="[auto|cpu|cuda]", help="Where to compute. auto: GPUs if there are any.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def profile(run: str, stage: str | None, step: int | None, steps: int, out: Path | None, **options: Any) -> int:
    """Profile a training step of RUN: a trace of every rank for Perfetto or Chrome, and a table of where time went.

    The stage is run on a copy, from the newest checkpoint before the step; the run itself is not touched. On GPUs a
    snapshot of memory is written too.
    """
    # Torch's profiler prints its own stages, and on machines without a GPU an error; ranks inherit this.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from rich.console import Console

    from ray_pipeline.cli.run import layout_there
    from ray_pipeline.dag.profiling import choose, take_profile
    from ray_pipeline.errors import UserError
    from ray_pipeline.layout.layout import with_layout

    run_dir = find_run(run, output_dir(options.pop("output_dir")))
    config = take_request(options).load_stored(run_dir)
    if config.backend == "modal":
        raise UserError("--backend modal: steps are profiled on this machine. Use --backend cpu or cuda.")
    layout = layout_there(config, None)
    request = choose(with_layout(config, layout), layout, run_dir, stage=stage, step=step, steps=steps, out=out)
    start = f"the checkpoint of step {request.checkpoint}" if request.checkpoint else "its beginning"
    click.echo(f"{request.stage}: from {start} to step {request.step}, ranks: {layout.gpus} ({layout.device}) ...")
    found = take_profile(request)
    show(Console(), found)
    click.echo(f"Traces, for https://ui.perfetto.dev or chrome://tracing: {request.out}/rank-*.trace.json.gz")
    if any("memory" in rank for rank in found["ranks"]):
        click.echo(f"Memory, for https://pytorch.org/memory_viz: {request.out}/rank-*.memory.pickle")
    return 0


def show(console: Any, found: dict[str, Any]) -> None:
    """The table of phases, and that of the longest operations of rank 0."""
    from rich.table import Table

    ranks = found["ranks"]
    table = Table(title=f"One step of {found['stage']}, measured at step {found['step']}", title_justify="left")
    for name in ("phase", "mean of ranks", "slowest rank", "share"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    whole = [rank["seconds"] for rank in ranks]
    rest = list(whole)
    for title, spans in ROWS:
        spent = [sum(rank["spans"].get(span, 0.0) for span in spans) for rank in ranks]
        rest = [left - part for left, part in zip(rest, spent, strict=True)]
        _row(table, title, spent, whole)
    _row(table, "the rest", [max(0.0, left) for left in rest], whole)
    table.add_section()
    _row(table, "whole step", whole, whole)
    _row(table, "messages between ranks, within the above", [rank["collectives"] for rank in ranks], whole)
    console.print(table)
    longest = Table(title="Longest operations of rank 0, without what they call", title_justify="left")
    for name in ("operation", "time", "calls"):
        longest.add_column(name, justify="left" if name == "operation" else "right", overflow="fold")
    for name, seconds, calls in ranks[0]["operations"]:
        longest.add_row(name, _milliseconds(seconds), f"{calls:.0f}")
    console.print(longest)
    most = max(rank["memory_gb"] for rank in ranks)
    console.print(f"Most memory of a rank: {most:.2f} GB. A profiled step is slower than another one.", highlight=False)


def _row(table: Any, title: str, spent: list[float], whole: list[float]) -> None:
    mean = sum(spent) / len(spent)
    share = sum(spent) / max(sum(whole), 1e-12)
    table.add_row(title, _milliseconds(mean), _milliseconds(max(spent)), f"{share:.1%}")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"
