"""`run`: the whole pipeline, or some of its stages."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ray_pipeline.cli.group import Interrupted, program
from ray_pipeline.cli.input_checks import check_inputs
from ray_pipeline.cli.options import layout_options, place_options, recipe_options, stage_options, take_request
from ray_pipeline.cli.runs import CONFIG_FILE, output_dir

if TYPE_CHECKING:
    from ray_pipeline.layout.layout import Layout
    from ray_pipeline.settings.schema import PipelineFields


@click.command()
@recipe_options
@layout_options
@place_options
@stage_options
def run(**options: Any) -> int:
    """Train: every stage, or those asked for. What is already done with the same settings is not done again."""
    request = take_request(options)
    folder = output_dir(options["output_dir"])
    stored = folder / (options["run_name"] or "") / CONFIG_FILE
    if options["run_name"] and options["config"] is None and stored.is_file():
        config = request.load_stored(stored.parent.absolute())
    else:
        config = request.load()
    return launch(config, options)


def launch(config: PipelineFields, options: dict[str, Any]) -> int:
    """Run the stages that the options select, here or on Modal. Returns the exit code."""
    from ray_pipeline.dag.identity import default_run_name
    from ray_pipeline.dag.plan import StageSelection

    stages = StageSelection(only=options["stage"], from_=options["from_"], until=options["until"])
    stages.check()
    notices(config)
    config = config.model_copy(update={"run_name": config.run_name or default_run_name(config)})
    layout = layout_here(config)
    check_inputs(config, layout, stages)
    with can_resume(config):
        if config.backend == "modal":
            from modal_gpu.launch import run_on_modal

            return run_on_modal(config, stages=stages, dry_run=options["dry_run"])
        from ray_pipeline.dag.workflow import run_pipeline  # after the layout is known to be legal: Ray takes seconds

        return run_pipeline(config, layout=layout, stages=stages, dry_run=options["dry_run"])


@contextmanager
def can_resume(config: PipelineFields) -> Iterator[None]:
    """Turn Ctrl-C, and the signals that end a program, into one line that says how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        place = "" if config.output_dir == output_dir(None) else f" --output-dir {shlex.quote(str(config.output_dir))}"
        command = f"{program()} resume {shlex.quote(str(config.run_name))}{place}"
        raise Interrupted(f"Stopped. Go on with: {command}") from None


def layout_here(config: PipelineFields) -> Layout:
    """The layout on this machine; says so when CPU ranks stand in for GPUs."""
    from ray_pipeline.hardware import count_gpus
    from ray_pipeline.layout.choice import device_notice, resolve_layout

    layout = resolve_layout(config, 0 if config.backend == "cpu" else count_gpus())
    if notice := device_notice(config, layout):
        click.echo(notice)
    return layout


def notices(config: PipelineFields) -> None:
    """Print what is odd but allowed."""
    from ray_pipeline.settings.checks import warnings

    for text in warnings(config):
        click.echo(f"Warning: {text}", err=True)
