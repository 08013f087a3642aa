"""The durable DAG: one Ray task per stage, ObjectRefs as edges, atomic records beside the outputs."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ray_pipeline.costs.fit import with_sampling
from ray_pipeline.costs.hardware_table import Hardware, running_hardware
from ray_pipeline.costs.prices import spent_text
from ray_pipeline.dag.budget import Budget, estimate_lines
from ray_pipeline.dag.identity import (
    absolute_name,
    identities,
    source_digests,
    source_names,
    stage_files,
    with_source_names,
)
from ray_pipeline.dag.invocations import note_invocation
from ray_pipeline.dag.ledger import (
    Record,
    RunFile,
    RunLock,
    close_record,
    read_record,
    read_status,
    refuse_foreign_run,
    settle,
)
from ray_pipeline.dag.live_report import LiveReport
from ray_pipeline.dag.plan import (
    PlannedStage,
    plan,
    refuse_other_config,
)
from ray_pipeline.dag.progress_view import ProgressView
from ray_pipeline.dag.request import RunRequest
from ray_pipeline.dag.stage_task import StageJob, run_stage
from ray_pipeline.dag.view import outcome_text, print_failure, print_lines, print_plan
from ray_pipeline.data.rows.manifest import notices_of
from ray_pipeline.errors import EXIT_FAILED, StageFailed, UserError
from ray_pipeline.launch.cluster import cluster_address, connect, refuse_unshared, wait_for
from ray_pipeline.launch.launchers import node_label
from ray_pipeline.launch.local_ray import start_local_ray
from ray_pipeline.launch.stage_context import StageResult
from ray_pipeline.layout.layout import Layout, with_layout
from ray_pipeline.records.artifacts import write_text
from ray_pipeline.records.input_files import note_digests
from ray_pipeline.records.progress import go_on
from ray_pipeline.report.run_page import write_report
from ray_pipeline.report.summary import print_summary, refused_exports, summary_rows
from ray_pipeline.settings.chain import upstream
from ray_pipeline.settings.layers import with_checksum
from ray_pipeline.settings.loading import config_yaml
from ray_pipeline.settings.run_folder import CONFIG_FILE, ERROR_LOG
from ray_pipeline.settings.schema import PipelineFields

if TYPE_CHECKING:
    import ray

POLL = 0.25  # seconds between looks at progress files


def execute(request: RunRequest) -> int:
    """Run what is not done yet, on Ray.

    Returns:
        0, or 1 when a stage failed or learned nothing.
    Raises:
        UserError: another config in use under this name, the run is locked, or a stage found a mistake in its input.
    """
    console = Console(width=None if Console().is_terminal else 150)
    run_dir, layout, selection = request.run_dir, request.layout, request.stages
    if not request.resume:
        refuse_other_config(request.config, run_dir)
    config = with_absolute_paths(with_layout(request.config, layout))
    refuse_foreign_run(run_dir)
    hardware = running_hardware(config, layout.device, request.cluster)
    if request.dry_run:
        rows = plan(config, layout, run_dir, selection, hardware)
        print_plan(console, rows, run_dir, layout)
        print_lines(console, estimate_lines(config, layout, rows, request.cluster))
        return 0
    selection.check()
    with RunLock(run_dir):
        for entry in RunFile(run_dir).stages.values():
            settle(run_dir / entry["folder"])
        rows = plan(config, layout, run_dir, selection, hardware)
        print_plan(console, rows, run_dir, layout)
        print_lines(console, estimate_lines(config, layout, rows, request.cluster))
        go_on(run_dir)
        jobs = _jobs(replace(request, config=config), rows, hardware)
        failed = False
        if any(job.runs for job in jobs):
            note_invocation(run_dir)
            with connected_ray(layout, run_dir, config.layout.wait_for_nodes, shared=request.shared_folder):
                import ray

                # num_cpus=0: the task only waits for its workers; holding a CPU would starve them. DEFAULT: outside the
                # placement group of a sweep's trial, which has no CPU for workers.
                task: Any = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy="DEFAULT")(run_stage)
                here = {} if request.shared_folder else {"label_selector": node_label()}
                done: dict[str, StageResult | ray.ObjectRef[StageResult]] = {}
                for job in jobs:
                    if job.runs:
                        inputs = (done[name] for name in job.inputs)
                        done[job.row.stage] = task.options(name=job.row.stage, **here).remote(job, *inputs)
                    elif job.row.action == "reuse":
                        done[job.row.stage] = job.earlier_result()
                pending = [(job.row, done[job.row.stage]) for job in jobs if job.runs]
                failed = not _watch(pending, console, config, run_dir)
        return _finish(config, run_dir, [row for row in rows if selection.selects(row.stage)], failed, console)


def _jobs(request: RunRequest, rows: Sequence[PlannedStage], hardware: Hardware | None) -> list[StageJob]:
    """Store the settings as the run's own; what each stage's task is given."""
    config, run_dir = request.config, request.run_dir
    files = {row.stage: stage_files(config, row.stage) for row in rows}
    run = accept(config, run_dir, rows, request.stored)
    note_digests(config.output_dir, {path for read in files.values() for path in read})
    return [
        StageJob(
            row, with_sampling(config, request.layout, row.stage, hardware), request.layout, run_dir,
            upstream(config, row.stage), run.wandb_id(row.stage, row.identity),
            request.stage_functions.get(row.stage), files[row.stage], request.shared_folder,
        )
        for row in rows
    ]  # fmt: skip


def with_absolute_paths(config: PipelineFields) -> PipelineFields:
    """Local sources by absolute path: stages and later resumes may start in another folder."""
    return with_source_names(config, {name: absolute_name(name) for name in source_names(config).values()})


def accept(config: PipelineFields, run_dir: Path, rows: Sequence[PlannedStage], stored: str | None = None) -> RunFile:
    """Store the settings, or those in `stored` that mean the same elsewhere, as the run's own, with their identities.

    Raises:
        UserError: an input file changed since the stages were planned.
    """
    run = RunFile(run_dir)
    run.sources |= source_digests(config, run.sources)
    found = identities(config, run.sources)
    if any(found[row.stage].key != row.identity for row in rows):
        raise UserError("An input file changed while the plan was made. Run the same command again.")
    run.stages = {
        row.stage: {"identity": row.identity, "folder": row.folder.name, "decides": dict(found[row.stage].decides)}
        for row in rows
    }
    run.chain = list(run.stages)
    for row in rows:
        if row.fresh:
            run.reruns[row.identity] = run.reruns.get(row.identity, 0) + 1
    run.save()
    write_text(run_dir / CONFIG_FILE, with_checksum(stored or config_yaml(config)))
    return run


def _finish(config: PipelineFields, run_dir: Path, rows: Sequence[PlannedStage], failed: bool, console: Console) -> int:
    status = read_status(run_dir)
    reused = frozenset(row.stage for row in rows if row.action == "reuse")
    status["cost"] = spent_text(config, status["stages"])
    write_report(run_dir, status)
    print_summary(console, summary_rows(status["stages"], reused), run_dir)
    print_lines(console, [status["cost"]] if status["cost"] else [])
    for text in (text for entry in status["stages"] for text in entry.get("damaged", [])):
        console.print(text, style="yellow", markup=False, highlight=False, soft_wrap=True)
    ours = {row.stage for row in rows}
    nothing = [e["stage"] for e in status["stages"] if e["status"] == "learned_nothing" and e["stage"] in ours]
    if nothing:
        console.print(f"LEARNED NOTHING: {', '.join(nothing)} did not beat the input.", style="yellow", markup=False)
    refused = [name for e in status["stages"] if e["stage"] in ours for name in refused_exports(e.get("metrics") or {})]
    if refused:
        text = f"REFUSED: {', '.join(refused)}: rounding makes another model of it; export.json has the figures."
        console.print(text, style="yellow", markup=False)
    return EXIT_FAILED if failed or nothing or refused else 0


@contextmanager
def connected_ray(layout: Layout, run_dir: Path, wait: float = 0.0, *, shared: bool = True) -> Iterator[None]:
    """A quiet local Ray, or the cluster that RAY_ADDRESS names; one this process already has is used and left alone.

    Args:
        wait: seconds that a cluster which grows is given to hold the ranks. shared: whether its nodes are to have the
            run's folder.
    Raises:
        UserError: the cluster cannot be reached, cannot hold the ranks, or its nodes do not share the run's folder.
        StageFailed: a local Ray does not start.
    """
    os.environ.update({"RAY_USAGE_STATS_ENABLED": "0", "GLOG_minloglevel": "2"})
    import ray

    ours = not ray.is_initialized()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if ours:
            address = cluster_address()
            start_local_ray() if address is None else connect(address)
            if threading.current_thread() is threading.main_thread():
                for number, handler in handlers.items():
                    # Ray puts handlers in their place that end the process with a dump of C++ frames.
                    signal.signal(number, handler)
        wait_for(layout.gpus, layout.min_gpus or layout.gpus, layout.device, wait)
        if cluster_address() is not None and shared:
            refuse_unshared(run_dir)
        yield
    finally:
        if ours:
            ray.shutdown()


def _watch(
    pending: Sequence[tuple[PlannedStage, Any]], console: Console, config: PipelineFields, run_dir: Path
) -> bool:
    """Show progress until every task has ended; False when a stage failed, after telling which and why."""
    import ray
    from ray.exceptions import RayError

    with (
        LiveReport(config, run_dir) as page,
        ProgressView(console, {row.stage: row.work for row, _ in pending}) as view,
    ):
        budget = Budget(config, run_dir, view.say)
        for row, ref in pending:  # a chain: a stage starts when the one before it has ended
            view.start(row.stage)
            while not ray.wait([ref], timeout=POLL)[0]:
                view.refresh()
                budget.look()
                page.look()
            try:
                ray.get(ref)
            except RayError as error:
                failure = _record_failure(row, error)
                view.finish(row.stage, "FAILED")
                break
            record = read_record(row.folder)
            assert record is not None
            view.finish(row.stage, outcome_text(record))
            for text in notices_of(row.folder):
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            return True
    if isinstance(failure, UserError):
        raise failure
    print_failure(console, row, failure)
    return False


def _record_failure(row: PlannedStage, error: Exception) -> UserError | StageFailed:
    """Enter the failure in the ledger, with the traceback in a file beside it."""
    cause = getattr(error, "cause", None) or error
    record = read_record(row.work) or Record(row.stage, row.identity, "running")
    if isinstance(cause, UserError):
        close_record(row.work, record, "failed", error=str(cause), error_log=None)
        return cause
    failure = cause if isinstance(cause, StageFailed) else StageFailed(f"{type(cause).__name__}: {cause}")
    write_text(row.work / ERROR_LOG, f"{failure}\n\n{failure.details}\n\n{error}\n")
    close_record(row.work, record, "failed", error=str(failure), error_log=str(row.work / ERROR_LOG))
    return failure
