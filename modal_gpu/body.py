"""What runs in containers: a conductor, which rents nothing itself, and the pieces of a run that it calls one by one.

A piece is the ordinary pipeline on a run folder on a volume, told to do the stages of one place alone: data and exports
on CPUs, training on GPUs. A container that is taken away begins its input again, which the run's ledger makes a resume.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import modal

from modal_gpu.failures import UNANSWERED
from modal_gpu.hosts import joined_hosts, tidy_checkpoints
from modal_gpu.job import Job, Outcome, Place, State, place_of
from modal_gpu.run_registry import Registry
from modal_gpu.volume_sync import lasting
from ray_pipeline.errors import EXIT_FAILED, EXIT_USER_ERROR, StageFailed, UserError, first_line

MOST_FAILURES = 3  # of a piece, one after the other, without a checkpoint between them
LONGEST = 24 * 3600.0  # seconds that Modal lets an input take
HAND_OVER = 23 * 3600.0  # after these the conductor begins its own successor
POLL = 30.0
# Of the service itself, which say nothing of the call that is asked for.


def conduct(job: Job, functions: Mapping[str, Any]) -> Outcome:
    """Call the pieces of a run until nothing is left. Holds the run's lock.

    Args:
        functions: "cpu", "gpu" and "conductor", the functions of this run with what it rents.
    """
    registry, me = Registry(), modal.current_function_call_id() or ""
    other = registry.lock(job.run, me)
    if other is not None:
        return Outcome(EXIT_USER_ERROR, f"run {job.run}: call {other} works on it already.", user_error=True)
    state = registry.read(job.run) or State(job.run)
    if state.call != me and state.piece:  # what another call left; this one begins anew
        state.piece, state.place, state.exit_code = "", "", 0
    state.call, state.outcome, state.volume, state.by = me, {}, job.volume, job.by
    registry.write(state)
    # An error leaves lock and state as they are: this call begins again, and waits for the piece that goes on.
    outcome = _Conductor(job, functions, registry, me).run()
    if outcome.moved is None:
        registry.note(job.run, outcome=asdict(outcome), phase="ended", piece="")
        registry.unlock(job.run, me)
    return outcome


class _Conductor:
    def __init__(self, job: Job, functions: Mapping[str, Any], registry: Registry, me: str):
        self.job, self.functions, self.registry, self.me = job, functions, registry, me
        self.began = time.time()
        state = registry.read(job.run) or State(job.run)
        self.place: Place | None = "gpu" if state.place == "gpu" else "cpu"
        self.piece, self.code, self.saved = state.piece, state.exit_code, state.saved
        self.failures = 0

    def run(self) -> Outcome:
        while self.place is not None:
            if not self.piece:
                if time.time() >= self.job.deadline:
                    return Outcome(EXIT_FAILED, "modal.timeout_seconds are over; what was saved is kept.")
                self.piece = self.functions[self.place].spawn(self.job, self.place).object_id
                self.registry.note(self.job.run, piece=self.piece, place=self.place, exit_code=self.code)
            found = self._wait()
            if found is None:
                return self._moved()
            self.piece = ""
            self.code = max(self.code, found.exit_code)
            if found.error is not None:
                return found
            self.place = found.next
        return Outcome(self.code)

    def _wait(self) -> Outcome | None:
        """How the piece ended; None when another conductor is to wait on."""
        call = modal.FunctionCall.from_id(self.piece)
        while True:
            try:
                return call.get(timeout=POLL)
            except TimeoutError:
                if time.time() - self.began > HAND_OVER:
                    return None
                if time.time() >= self.job.deadline:
                    call.cancel(terminate_containers=True)
                    return Outcome(EXIT_FAILED, "modal.timeout_seconds are over; what was saved is kept.")
            except UNANSWERED:
                time.sleep(min(POLL, 5.0))
            except modal.exception.FunctionTimeoutError:
                return self._again("it ran as long as Modal lets a function run")
            except modal.exception.InputCancellation:
                return Outcome(EXIT_FAILED, "it was stopped")
            except Exception as error:  # noqa: BLE001  whatever ended the container is raised here
                if "cancel" in f"{type(error).__name__} {error}".lower() or "terminated" in str(error).lower():
                    return Outcome(EXIT_FAILED, "it was stopped")
                return self._again(f"its container ended: {type(error).__name__}: {first_line(error)}")

    def _again(self, why: str) -> Outcome:
        """Go on at the same place, unless it failed too often without a new checkpoint."""
        state = self.registry.read(self.job.run) or State(self.job.run)
        self.failures = 1 if state.saved != self.saved else self.failures + 1
        self.saved = state.saved
        if self.failures >= MOST_FAILURES:
            phase = f" in {state.phase}" if state.phase else ""
            return Outcome(EXIT_FAILED, f"{why} ({self.failures} times{phase}).")
        print(f"{why}: it goes on from what was saved", flush=True)
        return Outcome(0, next=self.place)

    def _moved(self) -> Outcome:
        successor = self.functions["conductor"].spawn(self.job, self.functions).object_id
        self.registry.hand_over(self.job.run, successor)
        self.registry.note(self.job.run, call=successor)
        return Outcome(0, moved=successor)


def work(job: Job, place: Place) -> Outcome:
    """One piece: the stages of this place that come next, as many as follow one another here."""
    volume = modal.Volume.from_name(job.volume)
    volume.reload()
    registry = Registry()
    registry.take_over(f"{job.run}/piece", modal.current_function_call_id() or "")
    try:
        with joined_hosts(job, volume.commit) as leads:
            if not leads:  # another host of the cluster runs the stages; this one's ranks work for it
                return Outcome(0)
            return run_piece(job, place, volume.commit, registry)
    except UserError as error:
        return Outcome(EXIT_USER_ERROR, str(error), user_error=True)
    except StageFailed as error:
        return Outcome(EXIT_FAILED, str(error))


def run_piece(job: Job, place: Place, commit: Callable[[], None], registry: Registry) -> Outcome:
    """Plan, run what is next here, and say what is next after it; `commit` makes what was written last."""
    from ray_pipeline.dag.request import RunRequest, StageSelection
    from ray_pipeline.dag.workflow import execute
    from ray_pipeline.launch.cluster import named_cluster
    from ray_pipeline.layout.layout import layout_of

    device = job.device if place == "gpu" else "cpu"
    config = _settings(job, device)
    layout = layout_of(config.layout, device)
    if device == "cuda":
        _need_gpus(layout.gpus // job.hosts)
    run_dir = Path(job.runs_dir, job.run)
    tidy_checkpoints(run_dir, job.hosts)
    selection = StageSelection(**job.stages, since=job.asked)
    waiting = _waiting(config, layout, run_dir, selection)
    if waiting and place_of(waiting[0]) != place:
        return Outcome(0, next=place_of(waiting[0]))
    mine = _first_of(waiting, place, 1 if job.hosts > 1 else len(waiting))
    registry.note(job.run, phase=", ".join(mine) or "nothing is left to do")
    with lasting(run_dir, commit, partial(_told, registry, job.run), partial(_stop_wanted, registry, job.run)):
        code = execute(
            RunRequest(
                config, layout, StageSelection(**job.stages, since=job.asked, among=tuple(mine) or None), job.resume,
                cluster=named_cluster() if job.hosts > 1 else None, stored=job.stored, shared_folder=job.hosts == 1,
            )
        )  # fmt: skip
    left = _waiting(config, layout, run_dir, selection)
    failed = next((stage for stage in left if stage in mine), None)
    if failed is not None:
        return Outcome(code or EXIT_FAILED, _failure(run_dir, failed))
    return Outcome(code, next=place_of(left[0]) if left else None)


def _told(registry: Registry, run: str, checkpoint: str) -> None:
    with suppress(modal.exception.Error):  # a note: training goes on without it
        registry.note(run, saved=checkpoint)


def _stop_wanted(registry: Registry, run: str) -> bool:
    try:
        return registry.stop_wanted(run)
    except modal.exception.Error:
        return False


def _settings(job: Job, device: str) -> Any:
    from ray_pipeline.settings.loading import load_config

    # Beside the runs, not inside one: the run's own config.yaml is written by the workflow.
    recipe = Path(job.runs_dir, ".requests", f"{job.run}-{os.getpid()}.yaml")
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(job.settings, encoding="utf-8")
    try:
        return load_config(recipe, {"output_dir": job.runs_dir, "backend": device})
    finally:
        recipe.unlink(missing_ok=True)


def _need_gpus(number: int) -> None:
    from ray_pipeline.hardware import count_gpus

    if (found := count_gpus()) < number:
        raise RuntimeError(f"the container has {found} GPUs that PyTorch can use, and {number} were asked for")


def _waiting(config: Any, layout: Any, run_dir: Path, selection: Any) -> list[str]:
    """Stages that are to run, in order."""
    from ray_pipeline.dag.plan import plan

    return [row.stage for row in plan(config, layout, run_dir, selection) if row.action in ("run", "resume")]


def _first_of(waiting: list[str], place: Place, most: int) -> list[str]:
    mine: list[str] = []
    for stage in waiting[:most]:
        if place_of(stage) != place:
            break
        mine.append(stage)
    return mine


def _failure(run_dir: Path, stage: str) -> str:
    """What the ledger says of a stage that did not finish."""
    from ray_pipeline.dag.ledger import read_status

    entry = next(entry for entry in read_status(run_dir)["stages"] if entry["stage"] == stage)
    error = (entry.get("again") or {}).get("error") or entry.get("error")
    return f"{stage} failed: {error}" if error else f"{stage} did not finish"
