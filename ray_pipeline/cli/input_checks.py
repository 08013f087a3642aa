"""What `run` and `resume` open before anything starts: data, the model that is started from, the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ray_pipeline.config import PipelineFields
    from ray_pipeline.layout import Layout
    from ray_pipeline.workflow_plan import StageSelection


EVALUATED = ("sft", "dpo", "grpo", "distillation")  # whose models answer questions, with tools if there are any


def check_inputs(config: PipelineFields, layout: Layout, stages: StageSelection) -> None:
    """Look at the input files and names now, if a stage is going to read them in a run with this legal layout.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    from ray_pipeline.data.source_checks import check_sources
    from ray_pipeline.layout import with_layout
    from ray_pipeline.stage_chain import reads_folder, trained
    from ray_pipeline.workflow_plan import plan

    run_dir = (config.output_dir / str(config.run_name)).absolute()
    rows = plan(with_layout(config, layout), run_dir, stages)
    working = [row.stage for row in rows if row.action in ("run", "resume")]
    if "data_prep" in working:
        for text in check_sources(config):
            click.echo(text)
    if any(stage in working and reads_folder(config, stage) for stage in trained(config)):
        _check_folder(config)
    if "distillation" in working:
        from ray_pipeline.training.teacher_folder import check_teacher

        check_teacher(config, layout)
    if config.backend == "modal":
        return  # functions and the sandbox are needed where the stages run
    if config.tools.without_landlock or config.grpo.scoring.without_landlock:
        _tell_without_landlock()
    if any(stage in working for stage in EVALUATED):
        from ray_pipeline.tools.registry import check_tool_names

        check_tool_names(config.tools.names, without_landlock=config.tools.without_landlock)
    if "grpo" in working:
        from ray_pipeline.rewards.registry import check_reward_names

        check_reward_names(config.grpo.rewards, without_landlock=config.grpo.scoring.without_landlock)


def _tell_without_landlock() -> None:
    from ray_pipeline.sandbox_child import landlock_version

    if not landlock_version():
        click.echo("Warning: without_landlock: a model's programs can read every file that you can read.", err=True)


def _check_folder(config: PipelineFields) -> None:
    """Headers against the architecture; says what starts fresh."""
    from ray_pipeline.training.initial import open_initial  # imports torch

    folder = open_initial(config)
    if folder is not None and folder.fresh:
        names = ", ".join(folder.fresh[:4]) + (", ..." if len(folder.fresh) > 4 else "")
        click.echo(f"--init-from {folder.path}: {len(folder.fresh)} parameters start from fresh weights: {names}")
