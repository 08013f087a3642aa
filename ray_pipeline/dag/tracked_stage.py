"""What trackers are told of a stage around its figures: what it was made from, and how it ended."""

from __future__ import annotations

import json
from pathlib import Path

from ray_pipeline.dag.invocations import commit
from ray_pipeline.dag.ledger import Record, read_record
from ray_pipeline.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError
from ray_pipeline.hardware import machine, versions
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.trackers.tracker import Ending, TrackedRun
from ray_pipeline.settings.run_folder import CHECKPOINTS, MANIFEST, MODEL
from ray_pipeline.settings.schema import TRAINING_STAGES


def tracked_run(context: StageContext, record: Record) -> TrackedRun:
    """One stage as trackers name it; a rerun with other settings has another identity, and so another name."""
    upstream = {name: _digest(result.folder) for name, result in context.inputs.items()}
    facts = {
        "stage": record.stage,
        "identity": record.identity,
        "ranks": record.ranks,
        "commit": commit(),
        "versions": {name: version for name, version in versions().items() if version},
        "machine": machine(),
        "made_from": upstream,
    }
    return TrackedRun(
        folder=context.folder,
        stage=record.stage,
        name=f"{context.run_name}-{record.stage}-{record.identity[:6]}",
        run_id=context.wandb_id,
        group=context.run_name,
        project=context.config.tracking.project,
        entity=context.config.tracking.entity,
        config=context.config.model_dump(mode="json") | facts,
        upstream=upstream,
    )


def _digest(folder: Path) -> str:
    """Of a finished stage's weights, or of its data."""
    record = read_record(folder)
    if record is not None and record.weights_digest:
        return record.weights_digest
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"])
    except (OSError, ValueError, KeyError):
        return record.identity if record is not None else ""


def good_ending(context: StageContext, result: StageResult, digest: str | None) -> Ending:
    """Of a stage that ran to its end."""
    stage, folder = context.folder.name.partition("-")[0], context.folder
    nothing = result.learned is False
    figures: dict[str, float] = {**result.metrics, **{f"baseline/{n}": v for n, v in result.baselines.items()}}
    if stage in TRAINING_STAGES:
        figures.setdefault("params", context.config.model.num_params())
    outputs = {n: folder / n for n in (MODEL, CHECKPOINTS) if (folder / n).is_dir()}
    if stage == "export":
        outputs = {"export": folder}
    return Ending(
        "LEARNED NOTHING" if nothing else "DONE", int(nothing), figures=figures, outputs=outputs, digest=digest
    )


def bad_ending(error: BaseException) -> Ending:
    """Of a stage that ended in an error."""
    code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    return Ending("FAILED", code, reason=f"{type(error).__name__}: {error}"[:1000])
