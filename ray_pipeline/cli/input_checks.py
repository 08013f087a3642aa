"""What `run` and `resume` open before anything starts: data, the model that is started from, the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ray_pipeline.errors import UserError, command

if TYPE_CHECKING:
    from ray_pipeline.dag.request import RunRequest
    from ray_pipeline.launch.cluster import Cluster
    from ray_pipeline.layout.layout import Layout
    from ray_pipeline.settings.schema import PipelineFields


EVALUATED = ("sft", "dpo", "grpo", "distillation")  # whose models answer questions, with tools if there are any


def check_inputs(request: RunRequest) -> None:
    """Look at the input files and names now, if a stage is going to read them.

    Raises:
        UserError: naming the file, and the line where there is one.
    """
    from ray_pipeline.dag.plan import plan
    from ray_pipeline.data.sources.source_checks import check_sources
    from ray_pipeline.records.trackers.tracking import check_trackers
    from ray_pipeline.settings.chain import reads_folder, trained

    config, layout = request.config, request.layout
    if config.backend != "modal":
        check_trackers(config.tracking)
    rows = plan(config, layout, request.run_dir, request.stages)
    working = [row.stage for row in rows if row.action in ("run", "resume")]
    _check_memory(config, layout, working, request.cluster)
    _check_fp8(config, layout, working, request.cluster)
    if "data_prep" in working:
        for text in check_sources(config):
            click.echo(text)
    if any(stage in working and reads_folder(config, stage) for stage in trained(config)):
        _check_folder(config)
    if "distillation" in working:
        from ray_pipeline.teachers.teacher_folder import check_teacher

        check_teacher(config, layout)
    if config.backend == "modal":  # the sandbox is needed where the stages run; functions travel from here
        _check_travelling(config, working)
        return
    if config.tools.without_landlock or config.grpo.scoring.without_landlock:
        _tell_without_landlock()
    if any(stage in working for stage in EVALUATED):
        from ray_pipeline.tools.known_tools import check_tool_names

        check_tool_names(config.tools.names, without_landlock=config.tools.without_landlock)
    if "grpo" in working:
        from ray_pipeline.rewards.registry import check_reward_names

        check_reward_names(config.grpo.rewards, without_landlock=config.grpo.scoring.without_landlock)


def _check_travelling(config: PipelineFields, working: list[str]) -> None:
    """Rewards and tools by name, before anything is rented."""
    from ray_pipeline.rewards.registry import get_reward
    from ray_pipeline.tools.known_tools import get_tool

    for name in config.tools.names if any(stage in working for stage in EVALUATED) else ():
        get_tool(name)
    for name in config.grpo.rewards if "grpo" in working else ():
        get_reward(name)


def _tell_without_landlock() -> None:
    from ray_pipeline.isolation.child import landlock_version

    if not landlock_version():
        click.echo("Warning: without_landlock: a model's programs can read every file that you can read.", err=True)


def _check_memory(config: PipelineFields, layout: Layout, working: list[str], cluster: Cluster | None) -> None:
    """Refuse a stage that cannot fit where its ranks will run: this machine, a Ray cluster, or Modal.

    Raises:
        UserError: what is needed, what there is, and what would fit.
    """
    from ray_pipeline.costs.estimate import make_plan
    from ray_pipeline.costs.hardware_table import running_hardware
    from ray_pipeline.costs.table import needs_text, way_out
    from ray_pipeline.settings.schema import TRAINING_STAGES

    if not config.layout.check_memory:
        return
    hardware = running_hardware(config, layout.device, cluster)
    if hardware is None:
        click.echo(
            "Warning: the memory of these GPUs is not known, so that nothing says whether the run fits", err=True
        )
        return
    for stage in [name for name in working if name in TRAINING_STAGES]:
        found = make_plan(config, layout, stage, hardware)
        if found.fits:
            continue
        advice = f"What would: {found.advice[0]}." if found.advice else f"Use {way_out(found)}."
        raise UserError(
            f"{stage} does not fit: on {hardware.title} {needs_text(found)}. {advice} "
            f"`{command('plan', '--stage', stage)}` shows what takes it; "
            "--set layout.check_memory=false starts all the same."
        )


def _check_fp8(config: PipelineFields, layout: Layout, working: list[str], cluster: Cluster | None) -> None:
    """Raise UserError for fp8 on GPUs that have no tensor cores for it, where their kind is known before the start."""
    from ray_pipeline.hardware import computes_fp8, fp8_refusal, gpus

    stages = [stage for stage in working if getattr(getattr(config, stage, None), "precision", "") == "fp8"]
    if not stages or layout.device != "cuda" or config.layout.emulate_fp8:
        return
    if config.backend == "modal":
        names = [kind.strip().split(":")[0] for kind in config.modal.gpu_type.split(",")]
    elif cluster is not None:
        names = [node.accelerator for node in cluster.nodes if node.gpus and node.accelerator]
    else:
        names = [gpu.name for gpu in gpus()]
    without = sorted({name for name in names if not computes_fp8(name)})
    if without:
        raise UserError(fp8_refusal(stages[0], ", ".join(without)))


def _check_folder(config: PipelineFields) -> None:
    """Headers against the architecture; says what starts fresh."""
    from ray_pipeline.training.initial import open_initial  # imports torch

    folder = open_initial(config)
    if folder is not None and folder.fresh:
        names = ", ".join(folder.fresh[:4]) + (", ..." if len(folder.fresh) > 4 else "")
        click.echo(f"--init-from {folder.path}: {len(folder.fresh)} parameters start from fresh weights: {names}")
