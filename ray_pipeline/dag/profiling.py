"""Profiles steps of a run's stage on a copy: the run's folder is read, and what is written lies apart."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray_pipeline.dag.ledger import read_status
from ray_pipeline.errors import UserError, did_you_mean, resume_command
from ray_pipeline.launch.launchers import InlineLauncher, ProcessLauncher, RayLauncher
from ray_pipeline.launch.stage_context import Launcher, StageContext, StageResult
from ray_pipeline.layout.layout import Layout
from ray_pipeline.records.artifacts import atomic_folder, write_json
from ray_pipeline.records.integrity import refuse_foreign_folder
from ray_pipeline.settings.chain import trained, upstream
from ray_pipeline.settings.run_folder import CHECKPOINTS
from ray_pipeline.settings.schema import PipelineFields

SUMMARY = "profile.json"
WARM_UP = 2  # steps of the profiling process before the first that is measured
KEPT = "input.json"  # a stage's measured input, which need not be measured again


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile. step: counted from 1. checkpoint: steps taken by the checkpoint it goes on from; 0: none."""

    config: PipelineFields
    layout: Layout
    run_dir: Path
    stage: str
    step: int
    steps: int
    checkpoint: int
    out: Path


def choose(
    config: PipelineFields, layout: Layout, run_dir: Path, *, stage: str | None, step: int | None, steps: int,
    out: Path | None,
) -> ProfileRequest:  # fmt: skip
    """Look at everything that can be wrong before a process starts.

    Args:
        stage: None: the last training stage that has begun. step: None: three steps behind its newest checkpoint.
    Raises:
        UserError: no such stage or step, a stage before it is not finished, somebody works on the run, or the folder to
            write is there and no profile.
    """
    status = read_status(run_dir)
    if status["worked_on_by"] is not None:
        raise UserError(
            f"{run_dir}: a process is working on this run, which would disturb the times, and may remove the "
            "checkpoint they start from. Wait for it, or stop it."
        )
    entries = {entry["stage"]: entry for entry in status["stages"]}
    known = trained(config)
    begun = [name for name in known if "attempt" in entries[name]]
    if stage is not None and stage not in known:
        hint = did_you_mean(stage, known)
        raise UserError(f"--stage {stage}: trains nothing in this run{hint}. Use one of {', '.join(known)}.")
    chosen = stage or (begun[-1] if begun else known[0])
    for name in upstream(config, chosen):
        if entries[name]["status"] not in ("done", "learned_nothing"):
            raise UserError(
                f"{chosen}: reads what {name} makes, which is not finished. Go on with `{resume_command(run_dir)}`."
            )
    last = getattr(config, chosen).steps
    if step is not None and step + steps - 1 > last:
        raise UserError(f"--step {step}: with {steps} profiled, it goes beyond {chosen}'s {last} steps. Lower it.")
    saved = _checkpoints(Path(entries[chosen]["folder"])) if "folder" in entries[chosen] else []
    reach = step - 1 if step is not None else last - steps
    start = max((done for done in saved if done + WARM_UP <= reach), default=0)
    wanted = step if step is not None else min(start + WARM_UP + 1, max(1, last - steps + 1))
    place = (out or run_dir / "profiles" / f"{chosen}-step-{wanted}").absolute()
    refuse_foreign_folder(place)
    return ProfileRequest(config, layout, run_dir, chosen, wanted, steps, start, place)


def _checkpoints(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in sorted((folder / CHECKPOINTS).glob("step_*"))]


def take_profile(request: ProfileRequest) -> dict[str, Any]:
    """Run the stage on a copy up to the profiled steps; every rank's figures, as `profile.json` in `out` has them.

    The folder appears whole, and replaces an earlier profile alone.

    Raises:
        UserError, StageFailed: what the stage ends in.
    """
    with atomic_folder(request.out) as out, TemporaryDirectory(dir=out) as aside:
        found = _profile(request, out, Path(aside, f"{request.stage}-profile"))
        write_json(out / SUMMARY, found)
    return found


def _profile(request: ProfileRequest, out: Path, work: Path) -> dict[str, Any]:
    """Traces go to `out`; the stage runs in `work`."""
    from ray_pipeline.training.rank import rank_arguments
    from ray_pipeline.training.step_profile import profiled

    (work / CHECKPOINTS).mkdir(parents=True)
    entries = {entry["stage"]: entry for entry in read_status(request.run_dir)["stages"]}
    own = entries[request.stage].get("folder")
    if request.checkpoint:
        name = f"step_{request.checkpoint:08d}"
        (work / CHECKPOINTS / name).symlink_to(Path(own) / CHECKPOINTS / name, target_is_directory=True)
    if own and (Path(own) / KEPT).is_file():
        shutil.copy(Path(own) / KEPT, work / KEPT)
    inputs = {name: StageResult(Path(entries[name]["folder"])) for name in upstream(request.config, request.stage)}
    with _launcher(request) as launcher:
        context = StageContext(request.config, request.run_dir.name, request.run_dir, work, inputs, launcher)
        wanted = {"step": request.step, "steps": request.steps, "out": str(out)}
        found = launcher.run(request.stage, profiled, rank_arguments(context, request.stage) | {"profile": wanted})
    return {
        "run": request.run_dir.name, "stage": request.stage, "step": request.step, "steps": request.steps,
        "checkpoint": request.checkpoint, "ranks": found["ranks"],
    }  # fmt: skip


@contextmanager
def _launcher(request: ProfileRequest) -> Iterator[Launcher]:
    """One rank in this process, CPU ranks as processes; Ray where GPUs are shared out, or rollouts may need it."""
    from ray_pipeline.dag.workflow import connected_ray

    layout, limits = request.layout, request.config.layout
    needs_ray = request.stage == "grpo" or (layout.device == "cuda" and layout.gpus > 1)
    with connected_ray(layout, request.run_dir) if needs_ray else nullcontext():
        if needs_ray:
            yield RayLauncher(layout.gpus, layout.device, max_restarts=0, timeout_seconds=limits.timeout_seconds)
        elif layout.gpus == 1:
            yield InlineLauncher()
        else:
            yield ProcessLauncher(layout.gpus, timeout_seconds=limits.timeout_seconds)
