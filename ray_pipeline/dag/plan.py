"""Which stages will run, which are reused, and why: decided from settings and ledger. Starts nothing; no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ray_pipeline.costs.fit import rank_bytes, with_sampling
from ray_pipeline.costs.hardware_table import Hardware
from ray_pipeline.dag.identity import Identity, identities, source_digests
from ray_pipeline.dag.ledger import Record, RunFile, read_record
from ray_pipeline.dag.request import StageSelection
from ray_pipeline.errors import UserError, resume_command
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.units import seconds_text
from ray_pipeline.settings.chain import chain, upstream
from ray_pipeline.settings.run_folder import MODEL, newest_checkpoint, rerun_folder, stage_folder
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields

Action = Literal["run", "resume", "reuse", "skip"]


@dataclass(frozen=True)
class PlannedStage:
    """One row of the plan.

    Attributes:
        fresh: the attempt starts from nothing.
        replaces: it is made beside a finished one, which stays until this one is whole.
        estimated_memory_bytes: per rank.
    """

    stage: str
    action: Action
    reason: str
    ranks: int
    estimated_memory_bytes: int
    identity: str
    folder: Path
    fresh: bool = False
    replaces: bool = False

    @property
    def work(self) -> Path:
        """Where the attempt is made."""
        return rerun_folder(self.folder) if self.replaces else self.folder


def run_identities(config: PipelineFields, run: RunFile) -> dict[str, Identity]:
    """Every stage's identity; for local files that are gone, the digests the run was accepted with speak."""
    return identities(config, source_digests(config, run.sources))


def plan(
    config: PipelineFields,
    layout: Layout,
    run_dir: Path,
    selection: StageSelection,
    hardware: Hardware | None = None,
) -> list[PlannedStage]:
    """What a run of `config` on ranks in `layout` would do in `run_dir`, stage by stage.

    Args:
        hardware: of the ranks, where it is known: `layout.sampling: auto` takes what fits there.
    Raises:
        UserError: unknown stage names, or a selected stage whose inputs are not finished.
    """
    selection.check()
    selection.check_chain(chain(config))
    run = RunFile(run_dir)
    rows: dict[str, PlannedStage] = {}
    for stage, identity in run_identities(config, run).items():
        folder = stage_folder(run_dir, stage, identity.key)
        row = _decide(stage, upstream(config, stage), identity, folder, run, selection, rows)
        ranks = layout.gpus if stage in TRAINING_STAGES else 1
        node = None if hardware is None else hardware.node
        needs = rank_bytes(with_sampling(config, layout, stage, hardware), layout, stage, node)
        rows[stage] = replace(row, ranks=ranks, estimated_memory_bytes=needs)
    return list(rows.values())


def _decide(
    stage: str,
    inputs: tuple[str, ...],
    identity: Identity,
    folder: Path,
    run: RunFile,
    selection: StageSelection,
    rows: dict[str, PlannedStage],
) -> PlannedStage:
    record = _whole_record(folder)
    finished = record is not None and record.is_finished
    attempt = read_record(rerun_folder(folder)) if finished else None
    row = PlannedStage(stage, "run", "", 1, 0, identity.key, folder)
    if not selection.selects(stage):
        state = f"finished, {seconds_text(record.seconds)}" if record is not None and finished else "not finished"
        return replace(row, action="reuse" if finished else "skip", reason=f"not asked for; {state}")
    _need_inputs(stage, inputs, selection, rows)
    flag = selection.forces(stage, None if record is None else record.finished)
    rerun = [name for name in inputs if rows[name].action in ("run", "resume")]
    if record is not None and finished:
        if attempt is not None and not attempt.is_finished:
            return _unfinished(replace(row, replaces=True), attempt, identity.decides.get(f"{stage}.steps"))
        if flag is not None:
            return replace(row, reason=f"asked for by {flag}", fresh=True, replaces=True)
        learned = "" if record.status == "done" else " (learned nothing)"
        return replace(row, action="reuse", reason=f"finished, {seconds_text(record.seconds)}, unchanged{learned}")
    if record is not None:
        return _unfinished(row, record, identity.decides.get(f"{stage}.steps"))
    return replace(row, reason=_why_new(stage, identity, run, rerun))


def _need_inputs(stage: str, inputs: tuple[str, ...], selection: StageSelection, rows: dict[str, PlannedStage]) -> None:
    """A stage left out by the selection must be finished before one that reads it."""
    for name in inputs:
        if rows[name].action == "skip":
            flag = f"--stage {stage}" if selection.only else f"--from {selection.from_}"
            raise UserError(
                f"{flag}: {stage} reads the outputs of {name}, which is not finished with these settings. "
                f"Use --from {name}, or --until {stage} to run all that it needs."
            )


def _whole_record(folder: Path) -> Record | None:
    """The stage's record, unless it names a model that is no longer there."""
    record = read_record(folder)
    if record is not None and record.weights_digest and not (folder / MODEL).is_dir():
        return None
    return record


def _unfinished(row: PlannedStage, record: Record, all_steps: int | None) -> PlannedStage:
    """Go on from the newest checkpoint where there is one."""
    what = "failed" if record.status == "failed" else "unfinished"
    if record.status == "failed" and record.error:
        what = f"failed ({record.error.splitlines()[0][:60]})"
    if row.replaces:
        what = f"new attempt {what}"
    steps = newest_checkpoint(row.work)
    if steps is None:
        return replace(row, action="run", reason=f"{what}: no checkpoint yet")
    return replace(row, action="resume", reason=f"{what}: checkpoint at step {steps} of {all_steps}")


def _why_new(stage: str, identity: Identity, run: RunFile, rerun: list[str]) -> str:
    before = run.stages.get(stage)
    if before is None:
        return "not run yet"
    if before["identity"] == identity.key:
        return "not run yet" if not rerun else f"upstream {', '.join(rerun)} runs"
    changes = changed_settings(before["decides"], identity.decides)
    if changes:
        return "config changed: " + _shortened(changes, 2)
    return f"upstream {', '.join(rerun)} reruns" if rerun else "upstream changed"


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`grpo.beta 0.01 → 0.02` for every key that differs."""
    absent = "(absent)"
    keys = [key for key in {**before, **now} if before.get(key, absent) != now.get(key, absent)]
    return [f"{key} {_value(before.get(key, absent))} → {_value(now.get(key, absent))}" for key in keys]


def _value(value: Any) -> str:
    text = str(value)
    return f"contents {text[7:15]}" if text.startswith("sha256:") else text


def _shortened(changes: list[str], most: int) -> str:
    more = f" and {len(changes) - most} more" if len(changes) > most else ""
    return ", ".join(changes[:most]) + more


def refuse_other_config(config: PipelineFields, run_dir: Path) -> None:
    """`run` on a name that is in use goes on only with the settings that decided its results.

    Raises:
        UserError: listing what differs, and the ways out.
    """
    run = RunFile(run_dir)
    if not run.exists:
        return
    changes: list[str] = []
    for stage, identity in run_identities(config, run).items():
        if stage in run.stages:
            changes += changed_settings(run.stages[stage]["decides"], identity.decides)
    changes = list(dict.fromkeys(changes))  # the seed and the evaluation belong to several stages
    if changes:
        listing = "\n".join(f"  {change}" for change in changes[:12])
        more = f"\n  and {len(changes) - 12} more" if len(changes) > 12 else ""
        raise UserError(
            f"run {run_dir.name} is in use with another config:\n{listing}{more}\n"
            f"Use `{resume_command(run_dir, '--set', 'KEY=VALUE')}` to apply a change there and "
            "rerun what depends on it, or another --run-name."
        )
