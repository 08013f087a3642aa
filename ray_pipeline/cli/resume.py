"""`resume`: go on with a run where it stopped."""

from __future__ import annotations

from typing import Any

import click

from ray_pipeline.cli.input_checks import check_inputs
from ray_pipeline.cli.options import chain_options, layout_options, stage_options, take_request
from ray_pipeline.cli.run import can_resume, layout_here, notices
from ray_pipeline.cli.runs import find_run, output_dir


@click.command()
@click.argument("run")
@layout_options
@stage_options
@chain_options
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
@click.option("--max-steps", type=click.IntRange(1, 10**8), help="Lower the steps of every training stage.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change it; what depends on it reruns.")
def resume(run: str, **options: Any) -> int:
    """Go on with RUN from its last checkpoint, with the settings it was started with."""
    request = take_request(options)
    run_dir = find_run(run, output_dir(options["output_dir"]))
    config = request.load_stored(run_dir)
    from ray_pipeline.dag.plan import StageSelection

    stages = StageSelection(only=options["stage"], from_=options["from_"], until=options["until"])
    stages.check()
    notices(config)
    layout = layout_here(config)
    check_inputs(config, layout, stages)
    with can_resume(config):
        if config.backend == "modal":
            from modal_gpu.launch import run_on_modal

            return run_on_modal(config, stages=stages, dry_run=options["dry_run"])
        from ray_pipeline.dag.workflow import (
            resume_pipeline,  # after the layout is known to be legal: Ray takes seconds
        )

        return resume_pipeline(run_dir, config, layout=layout, stages=stages, dry_run=options["dry_run"])
