"""`watch`: a dashboard of a run in the terminal, from its folder, while it runs elsewhere."""

from __future__ import annotations

import importlib.util

import click

from ray_pipeline.cli.runs import find_run, latest_run, output_dir
from ray_pipeline.errors import UserError


@click.command()
@click.argument("run", required=False)
@click.option("--screenshot", type=click.Path(), hidden=True, help="Write an SVG of the first full view, and end.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def watch(run: str | None, screenshot: str | None, **options: str | None) -> int:
    """Watch RUN (default: the latest): stages, curves, ranks, memory, experts, samples, log. q ends watching alone."""
    if importlib.util.find_spec("textual") is None:
        raise UserError(
            "watch: needs the package textual, which is not installed. Install it with "
            "`pip install 'ray-pipeline[watch]'`, or look with `status` and `logs --follow`."
        )
    folder = output_dir(options["output_dir"])
    run_dir = find_run(run, folder) if run else latest_run(folder)
    from ray_pipeline.cli.dashboard import Dashboard

    Dashboard(run_dir, screenshot=screenshot).run(
        headless=screenshot is not None, size=(140, 44) if screenshot else None
    )
    return 0
