"""`watch`: a dashboard of a run in the terminal, from its folder or a bucket, while it runs elsewhere."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ray_pipeline.cli.runs import find_run, latest_run, output_dir
from ray_pipeline.errors import UserError

if TYPE_CHECKING:
    from ray_pipeline.records.mirror import Mirror, RunFiles

ON_MODAL = "modal://"


@click.command()
@click.argument("run", required=False, metavar="[RUN|ADDRESS]")
@click.option("--screenshot", type=click.Path(), hidden=True, help="Write an SVG of the first full view, and end.")
@click.option("--output-dir", help="Folder of all runs. Default: runs.")
def watch(run: str | None, screenshot: str | None, **options: str | None) -> int:
    """Watch RUN (default: the latest): stages, curves, ranks, memory, experts, samples, log. q ends watching alone.

    A run that is elsewhere is watched by its ADDRESS: modal://RUN, or its folder in a bucket, such as
    s3://BUCKET/runs/RUN (any that fsspec reads). Its small files are copied as they change.
    """
    if importlib.util.find_spec("textual") is None:
        raise UserError(
            "watch: needs the package textual, which is not installed. Install it with "
            "`pip install 'ray-pipeline[watch]'`, or look with `status` and `logs --follow`."
        )
    if run is None or "://" not in run:
        folder = output_dir(options["output_dir"])
        show(find_run(run, folder) if run else latest_run(folder), None, screenshot)
        return 0
    from ray_pipeline.records.mirror import Mirror

    with tempfile.TemporaryDirectory(prefix="watch-") as place:
        mirror = Mirror(files_at(run), Path(place, run.rstrip("/").rpartition("/")[2] or "run"), run)
        mirror.look()
        mirror.start()
        try:
            show(mirror.folder, mirror, screenshot)
        finally:
            mirror.stop()
    return 0


def files_at(address: str) -> RunFiles:
    """What reads a run's files there.

    Raises:
        UserError: an address of no kind that is known, or a run that Modal does not have.
    """
    if address.startswith(ON_MODAL):
        from modal_gpu.verbs import files_of

        return files_of(address.removeprefix(ON_MODAL))
    from ray_pipeline.records.buckets.bucket import Bucket

    return Bucket(address)


def show(run_dir: Path, mirror: Mirror | None, screenshot: str | None) -> None:
    """The dashboard, until it is ended."""
    from ray_pipeline.cli.dashboard import Dashboard

    Dashboard(run_dir, mirror=mirror, screenshot=screenshot).run(
        headless=screenshot is not None, size=(140, 44) if screenshot else None
    )
