"""`--backend modal`: checks, tells what it costs, sends the run off, and watches it unless it is left alone."""

from __future__ import annotations

import getpass
import os
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import modal

from modal_gpu.body import LONGEST
from modal_gpu.failures import check_credentials, check_reachable, explained, way_on
from modal_gpu.files import VolumeCopy, refuse_other_run, send_run, upload
from modal_gpu.functions import RUNS, RunApp, build_app, secrets_of, volumes_of
from modal_gpu.gpus import Shape, shape_of, trained_layout
from modal_gpu.job import Job, State, place_of
from modal_gpu.run_registry import Registry
from modal_gpu.watch import watch
from ray_pipeline.costs.estimate import make_plan
from ray_pipeline.costs.hardware_table import PROCESS, rented_hardware
from ray_pipeline.costs.prices import price, with_price
from ray_pipeline.dag.budget import estimate_lines
from ray_pipeline.dag.plan import PlannedStage, refuse_other_config
from ray_pipeline.dag.plan import plan as plan_stages
from ray_pipeline.dag.request import RunRequest, StageSelection
from ray_pipeline.dag.workflow import accept, with_absolute_paths
from ray_pipeline.errors import UserError, command
from ray_pipeline.layout.layout import with_layout
from ray_pipeline.records.artifacts import write_sealed
from ray_pipeline.settings.loading import config_yaml
from ray_pipeline.settings.run_folder import MODAL_FILE
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields

GIB = 2**30


def execute_on_modal(request: RunRequest) -> int:
    """Run the pipeline on Modal and bring its outputs into the local run folder. Returns the run's exit code."""
    return execute_in(request, None)


def execute_in(request: RunRequest, running: RunApp | None) -> int:
    """As `execute_on_modal`, in an app that is running already where there is one."""
    layout = trained_layout(request.config, request.layout)
    request = replace(request, layout=layout)
    shape = sized(request.config, request, shape_of(request.config, layout))
    refuse_blind_budget(request.config)
    if request.dry_run:
        return plan(request, shape)
    request.stages.check()
    if not request.resume:
        refuse_other_config(request.config, request.run_dir)
    config = with_absolute_paths(with_layout(request.config, layout))
    rows = plan_stages(config, layout, request.run_dir, request.stages)
    working = [row.stage for row in rows if row.action in ("run", "resume")]
    if not working:  # the table and the report are made here
        from ray_pipeline.dag.workflow import execute

        print("Modal: nothing is left to do, so nothing is rented.")
        return execute(request)
    if running is not None and shape.hosts > 1:
        raise UserError(f"{layout.gpus} GPUs on {shape.hosts} hosts: use `{command('run', '--backend', 'modal')}`.")
    check_credentials()
    run = str(config.run_name)
    tell(config, shape, rows, request)
    try:
        confirm(request, shape, working)
        check_reachable()
        state = _send_off(request, config, shape, rows, running)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Nothing was started on Modal.") from None
    print(f"Modal: call {state.call} runs {run}. {way_on(run)}")
    if request.detach:
        return 0
    return watch(state, request.run_dir)


def refuse_blind_budget(config: PipelineFields) -> None:
    """Refuse a budget that nobody can hold against anything.

    Raises:
        UserError: the price of what is rented is not known.
    """
    if config.cost.budget_usd is not None and price(config) is None:
        raise UserError(
            f"cost.budget_usd={config.cost.budget_usd:g}: what {config.modal.gpu_type} costs on Modal is not known "
            "here. Give --set cost.usd_per_gpu_hour=... as well."
        )


def tell(config: PipelineFields, shape: Shape, rows: list[PlannedStage], request: RunRequest) -> None:
    """What is rented, for which stages, for how much."""
    working = [row.stage for row in rows if row.action in ("run", "resume")]
    training = [stage for stage in working if place_of(stage) == "gpu"]
    plain = [stage for stage in working if place_of(stage) == "cpu"]
    where = [f"{shape.describe()} for {', '.join(training)}"] if training else []
    where += [f"a container without GPUs for {', '.join(plain)}"] if plain else []
    print(f"Modal: {'; '.join(where)}; run {config.run_name}, volume {config.modal.volume}")
    for line in estimate_lines(config, request.layout, rows):
        print(line)
    if len(shape.types) > 1:
        print(f"  reckoned with the dearest and the smallest of {', '.join(shape.types)}")


def confirm(request: RunRequest, shape: Shape, working: list[str]) -> None:
    """Ask before it costs money; --yes is an answer, and so is that no GPU is rented.

    Raises:
        UserError: nobody is there to ask, or the answer is no.
    """
    if request.yes or shape.on_cpu or not any(place_of(stage) == "gpu" for stage in working):
        return
    if not sys.stdin.isatty():
        raise UserError("--backend modal costs money, and nobody is there to ask. Add --yes.")
    if input("Rent them? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("Nothing was rented.")


def sized(config: PipelineFields, request: RunRequest, shape: Shape) -> Shape:
    """The containers with CPU cores and memory: what `plan` says the fullest stage needs, with room to spare."""
    cores = config.modal.cpus or max(4.0, 2.0 * shape.each)
    needs = [PROCESS * (shape.each + 2)]
    if config.layout.check_memory:
        hardware = rented_hardware_or_none(config)
        for stage in [name for name in config.stages if name in TRAINING_STAGES and hardware is not None]:
            assert hardware is not None
            found = make_plan(config, request.layout, stage, hardware)
            needs.append(int(found.host) if not shape.on_cpu else max(found.needs) * shape.each)
    gib = config.modal.memory_gib or max(16.0, 1.25 * max(needs) / GIB)
    return replace(shape, cpus=cores, memory_mib=int(gib * 1024))


def rented_hardware_or_none(config: PipelineFields) -> Any:
    """What is rented, where its data sheet is known."""
    try:
        return rented_hardware(config)
    except UserError:
        return None


def _send_off(
    request: RunRequest, config: PipelineFields, shape: Shape, rows: list[PlannedStage], running: RunApp | None
) -> State:
    """Inputs and the run's ledger to the volume, the app, the call. What is written here makes the folder a run."""
    run, run_dir = str(config.run_name), request.run_dir
    stored = config_yaml(config)
    with explained(" Nothing was started.", secret=config.modal.wandb_secret):
        registry = Registry()
        if (other := registry.holder(run)) is not None:
            raise UserError(f"run {run}: call {other} works on it on Modal. {way_on(run)}")
        volume = modal.Volume.from_name(config.modal.volume, create_if_missing=True)
        copy = VolumeCopy(volume)
        refuse_other_run(copy, run_dir, going_up=True)
        accept(config, run_dir, rows, stored)
        there = upload(with_price(config), volume, RUNS)
        send_run(copy, volume, run_dir)
        job = Job(
            run, config_yaml(there), stored, _selection(request.stages),
            config.modal.volume, RUNS, request.layout.device, time.time(), time.time() + config.modal.timeout_seconds,
            f"{getpass.getuser()}@{socket.gethostname()}", shape.hosts, request.resume,
        )  # fmt: skip
        state = State(run, volume=config.modal.volume, what=shape.describe(), by=job.by, since=time.time())
        registry.forget_stop(run)
        state = _begin(config, shape, job, running, state)
    note_call(run_dir, state)
    return state


def _selection(stages: StageSelection) -> dict[str, str | None]:
    return {"only": stages.only, "from_": stages.from_, "until": stages.until}


def _begin(config: PipelineFields, shape: Shape, job: Job, running: RunApp | None, state: State) -> State:
    """Start the conductor, which goes on without this program; the state with its call's id."""
    if running is not None:
        changed = {"cpu": running.functions["cpu"], "gpu": running.functions["gpu"]}
        changed["gpu"] = changed["gpu"].with_options(
            gpu=shape.gpu(), cpu=shape.cpus, memory=shape.memory_mib, secrets=secrets_of(config, dict(os.environ)),
            volumes=volumes_of(config), timeout=int(min(config.modal.timeout_seconds, LONGEST)),
        )  # fmt: skip
        return _spawn(running.app, running.functions | changed, job, state)
    made = build_app(config, shape)
    with modal.enable_output():  # the first time it takes minutes, which are told
        made.image.build()
    with made.app.run(detach=True):
        return _spawn(made.app, made.functions, job, state)
    # Here only after Ctrl-C, which Modal's client swallows.
    if made.app.app_id is not None:
        made.app.stop()
    raise KeyboardInterrupt


def _spawn(app: modal.App, functions: dict[str, Any], job: Job, state: State) -> State:
    state.app = str(app.app_id)
    registry = Registry()
    registry.write(state)  # before the call, whose conductor adds to it
    call = functions["conductor"].spawn(job, {name: function.hydrate() for name, function in functions.items()})
    state.call = str(call.object_id)
    known = registry.read(state.run)
    if known is not None and not known.call:
        registry.note(state.run, call=state.call)
    return state


def note_call(run_dir: Path, state: State) -> None:
    """Keep the call's id in the run's folder."""
    values = {"call": state.call, "app": state.app, "volume": state.volume, "what": state.what, "since": state.since}
    write_sealed(run_dir / MODAL_FILE, values)


def plan(request: RunRequest, shape: Shape) -> int:
    """Print what would run, and where, without an account."""
    from ray_pipeline.dag.workflow import execute

    settings = request.config.modal
    cores = f"{shape.cpus:g} cores and {shape.memory_mib / 1024:.0f} GiB each"
    print(f"Modal: would rent {shape.describe()} ({cores}) for at most {settings.timeout_seconds} s")
    return execute(request)
