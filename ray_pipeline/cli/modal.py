"""`modal`: runs on Modal, from any machine: are they going, what do they print, where are their outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ray_pipeline.cli.runs import output_dir
from ray_pipeline.cli.status import cost_text, show
from ray_pipeline.errors import command


@click.group()
def modal_group() -> None:
    """Look after runs on Modal, from any machine with the same account."""


@modal_group.command()
@click.option("--run", "check_run", is_flag=True, help="Also run a function there for a second, in a CPU container.")
def setup(check_run: bool) -> int:
    """Check account, network, secrets and volumes, and say what is to be done."""
    from modal_gpu.verbs import show_setup

    return show_setup(check_run)


@modal_group.command()
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Machine-readable.")
def status(run: str | None, as_json: bool) -> int:
    """Show RUN's stages, progress and cost as they are on Modal; without RUN, all runs there."""
    from modal_gpu.verbs import list_runs, run_status

    if run is None:
        return list_runs(as_json=as_json)
    headline, facts = run_status(run, facts_of)
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return 0
    click.echo(headline)
    if facts["stages"]:
        show(facts)
    if not facts["modal"]["going"]:
        click.echo(f"Fetch it with `{command('modal', 'pull', facts['run'])}`.")
    return 0


def facts_of(run_dir: Path) -> dict[str, Any]:
    """What `status` shows of a run's folder."""
    from ray_pipeline.dag.ledger import read_status

    facts = read_status(run_dir)
    return facts | {"cost": cost_text(run_dir, facts["stages"])}


@modal_group.command()
@click.argument("run")
@click.option("--follow", is_flag=True, help="Go on showing what comes, until it ends or Ctrl-C.")
@click.option("--lines", type=click.IntRange(1, 100000), default=200, help="Of the last ones. Default: 200.")
def logs(run: str, follow: bool, lines: int) -> int:
    """Show what RUN's containers print."""
    from modal_gpu.verbs import show_logs

    return show_logs(run, follow=follow, lines=lines)


@modal_group.command()
@click.argument("run")
@click.option("--checkpoints", is_flag=True, help="The newest of unfinished stages too, to go on here.")
@click.option("--volume", help="The volume it lies on. Default: the one it was launched with.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def pull(run: str, checkpoints: bool, volume: str | None, **options: str | None) -> int:
    """Fetch RUN's outputs, each held against its checksum; what is here already is not fetched again."""
    from modal_gpu.verbs import pull_run

    return pull_run(run, output_dir(options["output_dir"]), checkpoints=checkpoints, volume=volume)


@modal_group.command()
@click.argument("run")
@click.option("--now", is_flag=True, help="Do not wait for a checkpoint.")
def stop(run: str, now: bool) -> int:
    """Stop RUN: it saves first, unless --now."""
    from modal_gpu.verbs import stop_run

    return stop_run(run, now=now)
