"""`resume`: go on with a run where it stopped."""

from __future__ import annotations

from typing import Any

import click

from ray_pipeline.cli.options import chain_options, layout_options, rent_options, stage_options, take_request
from ray_pipeline.cli.run import at_work, executor
from ray_pipeline.cli.runs import find_run, output_dir


@click.command()
@click.argument("run")
@layout_options
@stage_options
@rent_options
@chain_options
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
@click.option("--max-steps", type=click.IntRange(1, 10**8), help="Lower the steps of every training stage.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change it; what depends on it reruns.")
def resume(run: str, **options: Any) -> int:
    """Go on with RUN from its last checkpoint, with the settings it was started with."""
    given = take_request(options)
    run_dir = find_run(run, output_dir(options["output_dir"]))
    config = given.load_stored(run_dir)
    with at_work(config, options, resume=True) as request:
        return executor(config)(request)
