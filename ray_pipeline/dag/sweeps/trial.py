"""One trial of a sweep: a run with one setting and one seed, whose stages may be other trials' as well. No Ray."""

from __future__ import annotations

import math
import time
import traceback
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace

from ray_pipeline.dag.identity import identities
from ray_pipeline.dag.ledger import read_record
from ray_pipeline.dag.plan import plan
from ray_pipeline.dag.request import RunRequest, StageSelection
from ray_pipeline.dag.sweeps.measure import Measure, figure_of
from ray_pipeline.dag.sweeps.shared_stages import alone, take_over, tell_failure, told_failure
from ray_pipeline.dag.sweeps.sweep_file import Sweep, run_name
from ray_pipeline.dag.workflow import execute, with_absolute_paths
from ray_pipeline.errors import StageFailed, UserError, first_line
from ray_pipeline.launch.cluster import Cluster
from ray_pipeline.layout.choice import resolve_layout
from ray_pipeline.report.sweep_result import TrialOutcome
from ray_pipeline.settings.chain import chain
from ray_pipeline.settings.run_folder import stage_folder
from ray_pipeline.settings.schema import PipelineFields

SAID = "sweep.log"  # in a trial's run: what `run` would have printed


@dataclass(frozen=True)
class Place:
    """Where trials run. gpus: that are there. cluster: None for a machine alone."""

    gpus: int
    cluster: Cluster | None = None

    def request(self, config: PipelineFields, until: str) -> RunRequest:
        """The trial as a run.

        Raises:
            UserError: its layout does not fit there.
        """
        there = "this machine" if self.cluster is None else "the Ray cluster"
        layout = resolve_layout(config, self.gpus, there=there)
        return RunRequest(with_absolute_paths(config), layout, StageSelection(until=until), cluster=self.cluster)


def run_trial(
    sweep: Sweep, index: int, values: Mapping[str, str], seed: int, place: Place, measured: Measure, invocation: str
) -> TrialOutcome:
    """Run what is not done yet of a setting with a seed; whatever goes wrong is its outcome.

    Args:
        invocation: names this call of `sweep`: a stage that failed in it is not tried again by another trial.
    """
    run = run_name(index, values, seed)
    try:
        config = sweep.config(values, seed, run)
        request = place.request(config, sweep.until)
        with alone(sweep.folder, run):
            request.run_dir.mkdir(parents=True, exist_ok=True)
            with (
                (request.run_dir / SAID).open("a", encoding="utf-8") as file,
                redirect_stdout(file),
                redirect_stderr(file),
            ):
                print(time.strftime("%Y-%m-%d %H:%M:%S"))
                for stage in stages_of(request):
                    _make(request, stage, invocation)
        outcome = outcome_of(request, measured)
        assert outcome is not None, "all its stages are finished"
        return outcome
    except (UserError, StageFailed) as error:
        return TrialOutcome(run, seed, "failed", reason=str(error))
    except Exception as error:  # noqa: BLE001 - a fault of ours in one trial does not end the others
        reason = f"{type(error).__name__}: {first_line(error)}\n{traceback.format_exc()}"
        return TrialOutcome(run, seed, "failed", reason=reason)


def stages_of(request: RunRequest) -> list[str]:
    """The stages that a trial runs."""
    return [stage for stage in chain(request.config) if request.stages.selects(stage)]


def _make(request: RunRequest, stage: str, invocation: str) -> None:
    """One stage: what this run or another one of the sweep has of it already, and the rest.

    Raises:
        StageFailed, UserError: it failed, here or in another trial before.
    """
    sweep_dir, selection = request.run_dir.parent, StageSelection(until=stage)
    [row] = [row for row in plan(request.config, request.layout, request.run_dir, selection) if row.stage == stage]
    with alone(sweep_dir, row.folder.name) as word:
        record = read_record(row.folder)
        if record is None or not record.is_finished:
            if (reason := told_failure(word, invocation)) is not None:
                raise StageFailed(f"{stage} failed {reason}")
            if (other := take_over(row.folder, sweep_dir)) is not None:
                print(f"{stage}: shared with {other}")
        try:
            execute(replace(request, stages=selection))
        except UserError as error:
            tell_failure(word, invocation, request.run_dir.name, str(error))
            raise
        record = read_record(row.folder)
        if record is None or not record.is_finished:
            reason = (record and record.error) or "it did not begin"
            tell_failure(word, invocation, request.run_dir.name, reason)
            raise StageFailed(f"{stage} failed: {reason}")


def outcome_of(request: RunRequest, measured: Measure) -> TrialOutcome | None:
    """What the run's ledger says; None while its stages are not all finished.

    Raises:
        UserError: the figure is none of that stage.
    """
    config, run_dir = request.config, request.run_dir
    wanted = stages_of(request)
    found = identities(config)
    records = {stage: read_record(stage_folder(run_dir, stage, found[stage].key)) for stage in wanted}
    done = {stage: record for stage, record in records.items() if record is not None and record.is_finished}
    if len(done) < len(wanted):
        return None
    figure = figure_of(measured, done[measured.stage])
    outcome = TrialOutcome(run_dir.name, config.seed, "done", figure, seconds=sum(r.seconds for r in done.values()))
    if not math.isfinite(figure):
        return replace(outcome, status="failed", figure=None, reason=f"{measured.stage}'s {measured.name} is {figure}")
    nothing = [stage for stage, record in done.items() if record.status == "learned_nothing"]
    return replace(outcome, note=f"{', '.join(nothing)} learned nothing" if nothing else "")
