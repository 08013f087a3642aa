"""`logs`: what a run's processes told and printed."""

from __future__ import annotations

import time
from pathlib import Path

import click

from ray_pipeline.cli.runs import find_run, latest_run, output_dir
from ray_pipeline.errors import UserError

POLL = 0.5  # seconds between looks with --follow
LEVELS = {"debug": 0, "info": 1, "warning": 2, "error": 3, "critical": 3}


@click.command()
@click.argument("run", required=False)
@click.option("--stage", help="Of this stage. Default: the one that works, or was worked on last.")
@click.option(
    "--rank", type=click.IntRange(0, 1 << 16), help="Of this rank alone. Default: of all, and of the stage itself."
)
@click.option("--level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", help="Least shown.")
@click.option("--follow", is_flag=True, help="Go on showing what comes, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="The lines as they are in the files.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def logs(
    run: str | None, stage: str | None, rank: int | None, level: str, follow: bool, as_json: bool, **options: str | None
) -> int:  # fmt: skip
    """Show what the processes of RUN (default: the latest) logged and printed, in the order of time."""
    import json

    from ray_pipeline.records.event_log import EventFiles, event_text

    runs = output_dir(options["output_dir"])
    run_dir = find_run(run, runs) if run else latest_run(runs)
    folder = stage_folder_of(run_dir, stage)
    files = EventFiles(folder, None if rank is None else f"rank-{rank}")
    shown = 0
    while True:
        for event in files.read():
            if LEVELS.get(event["level"], 1) >= LEVELS[level]:
                click.echo(json.dumps(event) if as_json else event_text(event))
                shown += 1
        if not follow:
            break
        time.sleep(POLL)
    if not shown:
        whose = f"rank {rank}" if rank is not None else "its processes"
        click.echo(f"{folder.name}: nothing at level {level} or above from {whose} yet (files: {folder / 'logs'}).")
    return 0


def stage_folder_of(run_dir: Path, stage: str | None) -> Path:
    """The folder of `stage`, or of the stage that was worked on last.

    Raises:
        UserError: it has not begun.
    """
    from ray_pipeline.dag.ledger import attempt_folder, read_status, worked_on_last

    last = worked_on_last(read_status(run_dir)["stages"], stage)
    if last is None:
        raise UserError(f"run {run_dir.name}: {stage or 'no stage'} has not begun, so nothing was logged yet.")
    return attempt_folder(last)
