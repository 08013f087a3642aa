"""`run`: the whole pipeline, or some of its stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.group import Interrupted
from ray_pipeline.cli.input_checks import check_inputs
from ray_pipeline.cli.options import (
    dial_options,
    layout_options,
    place_options,
    recipe_options,
    rent_options,
    stage_options,
    take_request,
)
from ray_pipeline.cli.runs import bring, folder_here, kept_alike, output_dir
from ray_pipeline.errors import UserError, command
from ray_pipeline.settings.run_folder import CONFIG_FILE

if TYPE_CHECKING:
    from ray_pipeline.dag.request import RunRequest
    from ray_pipeline.launch.cluster import Cluster
    from ray_pipeline.layout.layout import Layout
    from ray_pipeline.settings.schema import PipelineFields


@click.command()
@recipe_options
@dial_options
@layout_options
@place_options
@stage_options
@rent_options
def run(**options: Any) -> int:
    """Train: every stage, or those asked for. What is already done with the same settings is not done again."""
    from ray_pipeline.dag.identity import default_run_name

    if "://" in (options["output_dir"] or ""):
        options["output_dir"] = str(output_dir(options["output_dir"]))
    given = take_request(options)
    stored = output_dir(options["output_dir"]) / (options["run_name"] or "") / CONFIG_FILE
    if options["run_name"] and options["config"] is None:
        bring(stored.parent)
    if options["run_name"] and options["config"] is None and stored.is_file():
        config = given.load_stored(stored.parent.absolute())
    else:
        config = given.load()
    place = {"output_dir": folder_here(config.output_dir), "run_name": config.run_name or default_run_name(config)}
    config = config.model_copy(update=place)
    with at_work(config, options) as request:
        return executor(config)(request)


@contextmanager
def at_work(config: PipelineFields, options: dict[str, Any], *, resume: bool = False) -> Iterator[RunRequest]:
    """Check what is asked for, which the block does; a run of a bucket is brought here first and kept there."""
    run_dir = (config.output_dir / str(config.run_name)).absolute()
    if options["dry_run"]:
        bring(run_dir)
    with nullcontext() if options["dry_run"] else kept_alike(run_dir):
        request = checked(config, options, resume=resume)
        with can_resume(request.config):
            yield request


def checked(config: PipelineFields, options: dict[str, Any], *, resume: bool = False) -> RunRequest:
    """What the options ask for, after all that can be wrong with it was looked at; prints what is odd but allowed.

    Raises:
        UserError: stages that do not exist, a layout that cannot run, inputs that cannot be read, too little memory.
    """
    from ray_pipeline.dag.request import RunRequest, StageSelection
    from ray_pipeline.launch.cluster import named_cluster

    stages = StageSelection(only=options["stage"], from_=options["from_"], until=options["until"])
    stages.check()
    notices(config)
    cluster = named_cluster() if config.backend != "modal" else None
    if options["detach"] and config.backend != "modal":
        raise UserError("--detach: a run on this machine ends with the terminal. Add --backend modal, or use nohup.")
    request = RunRequest(
        config, layout_there(config, cluster), stages, resume, options["dry_run"], cluster,
        detach=options["detach"], yes=options["yes"],
    )  # fmt: skip
    check_inputs(request)
    return request


def executor(config: PipelineFields) -> Callable[[RunRequest], int]:
    """What runs the stages and returns the exit code: Ray here, or Modal."""
    if config.backend == "modal":
        from modal_gpu.launch import execute_on_modal

        return execute_on_modal
    from ray_pipeline.dag import workflow  # after the layout is known to be legal: Ray takes seconds

    return workflow.execute


@contextmanager
def can_resume(config: PipelineFields) -> Iterator[None]:
    """Turn Ctrl-C, and the signals that end a program, into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        if str(stopped):  # nothing to go on with
            raise Interrupted(f"Stopped. {stopped}") from None
        place = () if config.output_dir == output_dir(None) else ("--output-dir", config.output_dir)
        raise Interrupted(f"Stopped. Go on with: {command('resume', str(config.run_name), *place)}") from None


def layout_there(config: PipelineFields, cluster: Cluster | None) -> Layout:
    """The layout on this machine or the cluster; says so when CPU ranks stand in for GPUs."""
    from ray_pipeline.hardware import count_gpus
    from ray_pipeline.layout.choice import device_notice, resolve_layout

    if cluster is None:
        layout = resolve_layout(config, 0 if config.backend == "cpu" else count_gpus())
    else:
        # A cluster that grows on demand may have none of them yet.
        wanted = config.layout.gpus or 0 if config.layout.wait_for_nodes and config.backend != "cpu" else 0
        layout = resolve_layout(config, max(cluster.gpus, wanted), there="the Ray cluster")
        most = max((node.gpus for node in cluster.nodes), default=0)
        if layout.device == "cuda" and 0 < most < layout.tp:
            text = f"tp_size={layout.tp}: a node has {most} GPUs, so tensor parallelism crosses the network"
            click.echo(f"Warning: {text}", err=True)
    if notice := device_notice(config, layout):
        click.echo(notice if cluster is None else notice.replace("here", "in the Ray cluster", 1))
    return layout


def notices(config: PipelineFields) -> None:
    """Print what is odd but allowed."""
    from ray_pipeline.hardware import untested, versions
    from ray_pipeline.settings.checks import warnings

    other = untested(versions())
    for text in [*warnings(config), *([other] if other else [])]:
        click.echo(f"Warning: {text}", err=True)
