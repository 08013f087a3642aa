"""What trackers are told of a stage around its figures: what it was made from, and how it ended."""

from __future__ import annotations

import json
from pathlib import Path

from ray_pipeline.costs.prices import price, spent
from ray_pipeline.dag.invocations import commit
from ray_pipeline.dag.ledger import Record, read_record, read_status
from ray_pipeline.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError
from ray_pipeline.hardware import machine, versions
from ray_pipeline.launch.stage_context import StageContext, StageResult
from ray_pipeline.records.integrity import SEAL
from ray_pipeline.records.trackers.tracker import Ending, TrackedRun
from ray_pipeline.settings.run_folder import CHECKPOINTS, MANIFEST, MODEL
from ray_pipeline.settings.schema import TRAINING_STAGES

WHOLE = {"data_prep": "data", "export": "export"}  # stages whose whole folder is what they make, and its kind


def tracked_run(context: StageContext, record: Record) -> TrackedRun:
    """One stage as trackers name it; a rerun with other settings has another identity, and so another name."""
    upstream = {name: made_digest(result.folder) for name, result in context.inputs.items()}
    facts = environment_facts() | {
        "stage": record.stage,
        "identity": record.identity,
        "ranks": record.ranks,
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
        spent=lambda: _spent(context),
    )


def environment_facts() -> dict[str, object]:
    """The source, the packages and the machine that make a result."""
    found = {name: version for name, version in versions().items() if version}
    return {"commit": commit(), "versions": found, "machine": machine()}


def _spent(context: StageContext) -> float | None:
    """Of the whole run so far; None without a price, or where a file of the run is damaged: a note ends no stage."""
    if price(context.config) is None:
        return None
    try:
        return spent(context.config, read_status(context.run_dir)["stages"])
    except UserError:
        return None


def made_digest(folder: Path) -> str:
    """Of a finished stage's weights, or of its data."""
    record = read_record(folder)
    if record is not None and record.weights_digest:
        return record.weights_digest
    try:
        return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))[SEAL])
    except (OSError, ValueError, KeyError):
        return record.identity if record is not None else ""


def good_ending(context: StageContext, result: StageResult, digest: str | None) -> Ending:
    """Of a stage that ran to its end."""
    stage, folder = context.folder.name.partition("-")[0], context.folder
    nothing = result.learned is False
    figures: dict[str, float] = {**result.metrics, **{f"baseline/{n}": v for n, v in result.baselines.items()}}
    if stage in TRAINING_STAGES:
        figures.setdefault("params", context.config.model.num_params())
    if (amount := _spent(context)) is not None:
        figures["cost/run_usd"] = amount
    outputs = {n: folder / n for n in (MODEL, CHECKPOINTS) if (folder / n).is_dir()}
    if stage in WHOLE:
        outputs = {WHOLE[stage]: folder}
    return Ending(
        "LEARNED NOTHING" if nothing else "DONE", int(nothing), figures=figures, outputs=outputs,
        digest=digest or made_digest(folder),
    )  # fmt: skip


def bad_ending(error: BaseException) -> Ending:
    """Of a stage that ended in an error."""
    code = EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED
    return Ending("FAILED", code, reason=f"{type(error).__name__}: {error}"[:1000])
