"""One stage as a task of the workflow: looks in the ledger, runs the stage, enters what came of it. No Ray."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ray_pipeline.dag.ledger import Record, begin_record, close_record, read_record, settle
from ray_pipeline.dag.plan import PlannedStage
from ray_pipeline.launch.launchers import RayLauncher, prepare_folder, worker_environment
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.layout.layout import layout_of
from ray_pipeline.layout.rules import elastic_layouts
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.records.input_files import Digests, InputGuard
from ray_pipeline.records.rank_output import LOGS, output_file, output_to
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields

StageFunction = Callable[[StageContext], StageResult]


@dataclass(frozen=True)
class StageJob:
    """What a stage task is given; picklable.

    Attributes:
        files: SHA-256 of the local files that the stage reads, as the run was accepted with them.
    """

    row: PlannedStage
    config: PipelineFields
    run_name: str
    run_dir: Path
    inputs: tuple[str, ...]
    wandb_id: str
    device: Literal["cpu", "cuda"]
    function: StageFunction | None
    files: Mapping[Path, str] = field(default_factory=dict)


def execute_stage(job: StageJob, *upstream: StageResult) -> StageResult:
    """Body of a stage's task: look in the ledger again, run the stage, enter what came of it."""
    row = job.row
    settle(row.folder)
    before = read_record(row.folder)
    if before is not None and before.is_finished and not row.again:
        return before.result(row.folder)
    prepare_folder(row.work)
    if row.fresh:  # what an earlier new attempt left
        shutil.rmtree(row.work)
        row.work.mkdir()
    shutil.rmtree(row.work / LOGS, ignore_errors=True)  # of an earlier attempt
    os.environ.update(worker_environment(1, os.cpu_count() or 1, job.device))
    inputs = dict(zip(job.inputs, upstream, strict=True))
    record = begin_record(
        row.work,
        Record(
            row.stage, row.identity, "running", wandb_id=job.wandb_id, ranks=row.ranks,
            upstream={name: result.folder.name for name, result in inputs.items()},
        ),
    )  # fmt: skip
    layout = job.config.layout
    elastic = [smaller.gpus for smaller in elastic_layouts(job.config, layout_of(job.config.layout, job.device))]
    launcher = RayLauncher(
        row.ranks, job.device, max_restarts=layout.max_restarts, timeout_seconds=layout.timeout_seconds,
        frozen_seconds=layout.frozen_seconds,
        elastic=elastic if row.stage in TRAINING_STAGES else (),
    )  # fmt: skip
    function = job.function or importlib.import_module(f"ray_pipeline.stages.{row.stage}").run
    guard = InputGuard(job.files, Digests(job.config.output_dir))
    guard.check()
    context = StageContext(
        job.config, job.run_name, job.run_dir, row.work, inputs, launcher, wandb_id=job.wandb_id, guard=guard
    )
    with output_to(output_file(row.work, "stage")):
        result = function(context)
    guard.check()  # what was read is what the identity names, or the stage did not happen
    model = row.work / "model"
    digest = weights_digest(model) if row.stage in TRAINING_STAGES and model.is_dir() else None
    close_record(
        row.work, record, "learned_nothing" if result.learned is False else "done",
        metrics=dict(result.metrics), baselines=dict(result.baselines), learned=result.learned, weights_digest=digest,
    )  # fmt: skip
    settle(row.folder)
    return StageResult(row.folder, result.metrics, result.baselines, result.learned)
