"""One stage as a task of the workflow: looks in the ledger, runs the stage, enters what came of it. No Ray."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ray_pipeline.dag.ledger import Record, begin_record, close_record, read_record, settle
from ray_pipeline.dag.plan import PlannedStage
from ray_pipeline.dag.tracked_stage import bad_ending, good_ending, tracked_run
from ray_pipeline.errors import UserError, resume_command
from ray_pipeline.hardware import num_cpus
from ray_pipeline.launch.launchers import RayLauncher, prepare_folder, worker_environment
from ray_pipeline.launch.stage_context import StageContext, StageFunction, StageResult
from ray_pipeline.layout.layout import Layout
from ray_pipeline.layout.rules import elastic_layouts
from ray_pipeline.records.artifacts import weights_digest
from ray_pipeline.records.event_log import recorded
from ray_pipeline.records.input_files import Digests, InputGuard
from ray_pipeline.records.progress import stop_reason
from ray_pipeline.records.trackers.tracking import Tracking
from ray_pipeline.settings.run_folder import LOGS, MODEL
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields


@dataclass(frozen=True)
class StageJob:
    """What a stage task is given; picklable.

    Attributes:
        files: SHA-256 of the local files that the stage reads, as the run was accepted with them.
        shared_folder: whether all machines of a cluster have the run's folder.
    """

    row: PlannedStage
    config: PipelineFields
    layout: Layout
    run_dir: Path
    inputs: tuple[str, ...]
    wandb_id: str
    function: StageFunction | None
    files: Mapping[Path, str] = field(default_factory=dict)
    shared_folder: bool = True

    @property
    def runs(self) -> bool:
        """Whether there is something to do."""
        return self.row.action in ("run", "resume")

    def earlier_result(self) -> StageResult:
        """What the stage left behind when it was finished."""
        record = read_record(self.row.folder)
        assert record is not None
        return record.result(self.row.folder)


def run_stage(job: StageJob, *upstream: StageResult) -> StageResult:
    """Body of a stage's task: look in the ledger again, run the stage, enter what came of it."""
    row = job.row
    settle(row.folder)
    before = read_record(row.folder)
    if before is not None and before.is_finished and not row.replaces:
        return before.result(row.folder)
    prepare_folder(row.work)
    if row.fresh:  # what an earlier new attempt left
        shutil.rmtree(row.work)
        row.work.mkdir()
    shutil.rmtree(row.work / LOGS, ignore_errors=True)  # of an earlier attempt
    os.environ.update(worker_environment(1, num_cpus(), job.layout.device))
    if (reason := stop_reason(job.run_dir)) is not None:
        raise UserError(f"{row.stage} was not started: {reason}. Go on with: {resume_command(job.run_dir)}")
    inputs = dict(zip(job.inputs, upstream, strict=True))
    record = begin_record(
        row.work,
        Record(
            row.stage, row.identity, "running", wandb_id=job.wandb_id, ranks=row.ranks,
            upstream={name: result.folder.name for name, result in inputs.items()},
        ),
    )  # fmt: skip
    limits = job.config.layout
    elastic = [smaller.gpus for smaller in elastic_layouts(job.config, job.layout)]
    launcher = RayLauncher(
        row.ranks, job.layout.device, max_restarts=limits.max_restarts, timeout_seconds=limits.timeout_seconds,
        frozen_seconds=limits.frozen_seconds,
        elastic=elastic if row.stage in TRAINING_STAGES else (), first_here=not job.shared_folder,
    )  # fmt: skip
    function = job.function or importlib.import_module(f"ray_pipeline.stages.{row.stage}").run
    guard = InputGuard(job.files, Digests(job.config.output_dir))
    guard.check()
    context = StageContext(
        job.config, job.run_dir.name, job.run_dir, row.work, inputs, launcher, wandb_id=job.wandb_id, guard=guard
    )
    with recorded(row.work, "stage", job.config.tracking.log_level):
        tracking = Tracking(job.config.tracking, tracked_run(context, record)).start()
        try:
            result = function(context)
            guard.check()  # what was read is what the identity names, or the stage did not happen
            model = row.work / MODEL
            digest = weights_digest(model) if row.stage in TRAINING_STAGES and model.is_dir() else None
            _close(record, result, row.work, digest)
        except BaseException as error:
            tracking.finish(bad_ending(error))
            raise
        tracking.finish(good_ending(context, result, digest))
    settle(row.folder)
    return StageResult(row.folder, result.metrics, result.baselines, result.learned)


def _close(record: Record, result: StageResult, folder: Path, digest: str | None) -> None:
    """Enter what came of the stage."""
    close_record(
        folder, record, "learned_nothing" if result.learned is False else "done",
        metrics=dict(result.metrics), baselines=dict(result.baselines), learned=result.learned, weights_digest=digest,
    )  # fmt: skip
