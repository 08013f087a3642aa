"""What `ray-pipeline modal VERB` does: asks the registry, the volume and the call, from any machine."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import modal
from modal.config import config as modal_settings

from modal_gpu.failures import OAUTH, check_credentials, check_reachable, explained, within
from modal_gpu.files import VolumeCopy, VolumeRun, fetch
from modal_gpu.job import State
from modal_gpu.run_registry import Registry, call_lives
from modal_gpu.watch import stop
from ray_pipeline.errors import UserError, command, did_you_mean
from ray_pipeline.records.mirror import Mirror
from ray_pipeline.settings.run_folder import CONFIG_FILE
from ray_pipeline.settings.schema import ModalConfig

STOP_WAIT = 120.0  # seconds that a run is given to save


def _connected() -> Registry:
    check_credentials()
    check_reachable()
    with explained():
        return Registry()


def _find(registry: Registry, run: str) -> State:
    """What is known of a run, under its name or the path of its folder.

    Raises:
        UserError: nothing; names those that are known.
    """
    name = Path(run).name
    with explained():
        state = registry.read(name)
        if state is not None:
            return state
        known = registry.runs()
    listed = f"Known are {', '.join(known[-10:])}." if known else "None is known."
    pull = command("modal", "pull", name, "--volume", ModalConfig().volume)
    raise UserError(
        f'run "{name}": nobody launched it on this account in the last week{did_you_mean(name, known)}. {listed} '
        f"An older one is on its volume still: {pull}"
    )


def run_status(run: str, read: Callable[[Path], dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """A line on the call, and the run's facts from the volume's own files; no stages before it began.

    Args:
        read: makes the facts of a run's folder, as `status` shows them.
    """
    registry = _connected()
    state = _find(registry, run)
    with explained(), tempfile.TemporaryDirectory() as folder:
        going = bool(state.call) and not state.ended and call_lives(state.call)
        there, run_dir = _files(state), Path(folder, state.run)
        facts: dict[str, Any] = {"run": state.run, "stages": []}
        if CONFIG_FILE in there.files():
            Mirror(there, run_dir, state.run).look()
            facts = read(run_dir)
    for stage in facts["stages"]:
        # Nobody here holds the run's lock; there, a container may.
        if stage["status"] == "interrupted" and going and stage["stage"] in state.phase:
            stage["status"] = "running"
        if "folder" in stage:
            stage["folder"] = f"{state.volume}:/{state.run}/{Path(stage['folder']).name}"
    facts |= {
        "run_dir": f"{state.volume}:/{state.run}",
        "worked_on_by": None,
        "modal": asdict(state) | {"going": going},
    }
    return _headline(state, going), facts


def files_of(run: str) -> VolumeRun:
    """The files of a run as its volume has them."""
    state = _find(_connected(), run)
    with explained():
        return _files(state)


def _files(state: State) -> VolumeRun:
    return VolumeRun(VolumeCopy(modal.Volume.from_name(state.volume)), state.run)


def _headline(state: State, going: bool) -> str:
    age = time.strftime("%Y-%m-%d %H:%M", time.localtime(state.since))
    parts = [f"{state.what}, call {state.call} since {age} by {state.by}"]
    if going:
        parts.append(state.phase + (f", saved {state.saved}" if state.saved else ""))
    elif state.ended:
        error = state.outcome.get("error")
        parts.append(f"ended: {error}" if error else f"ended with exit code {state.outcome.get('exit_code')}")
    else:
        parts.append("its call is over, without a word: resume it")
    return "; ".join(parts)


def list_runs(*, as_json: bool) -> int:
    """All runs that are known, a line each."""
    registry = _connected()
    with explained():
        states = [state for name in registry.runs() if (state := registry.read(name)) is not None]
        going = {state.run: not state.ended and bool(state.call) and call_lives(state.call) for state in states}
    if as_json:
        print(json.dumps([asdict(state) | {"going": going[state.run]} for state in states], indent=2))
        return 0
    for state in states:
        print(f"{state.run:<24}{_headline(state, going[state.run])}")
    if not states:
        print(f"No runs on Modal. Start one with `{command('run', '--backend', 'modal', '--gpus', '1')}`.")
    return 0


def show_logs(run: str, *, follow: bool, lines: int) -> int:
    """The last lines of the app's log, then what comes."""
    registry = _connected()
    state = _find(registry, run)
    shown: set[str] = set()
    with explained(f" Its files: `{command('modal', 'pull', state.run)}`."):
        if not follow:
            call = state.piece or state.call
            if state.app:
                for entry in modal.App.lookup(state.app).logs.tail(lines):
                    print(entry.message, end="")
            else:
                for entry in modal.FunctionCall.from_id(call).logs.tail(lines):
                    print(entry.message, end="")
            return 0
        while True:
            state = registry.read(state.run) or state
            if state.piece and state.piece not in shown:
                shown.add(state.piece)
                for entry in modal.FunctionCall.from_id(state.piece).logs.stream():
                    print(entry.message, end="", flush=True)
            elif state.ended or not call_lives(state.call):
                return 0
            else:
                time.sleep(1.0)


def pull_run(run: str, runs_dir: Path, *, checkpoints: bool, volume: str | None) -> int:
    """Fetch outputs; of a run that is going what is there now."""
    registry = _connected()
    name = Path(run).name
    if volume is None:
        volume = _find(registry, run).volume
    with explained():
        copy = VolumeCopy(modal.Volume.from_name(volume))
        if not copy.files(f"/{name}"):
            raise UserError(f"run {name}: nothing of it is on the volume {volume}. It may not have begun yet.")
        found = fetch(copy, name, runs_dir, checkpoints=checkpoints)
    print(found.describe(runs_dir / name))
    return 0


def stop_run(run: str, *, now: bool) -> int:
    """Ask the run to save and end; end its containers at once with `now`, or where it does not."""
    registry = _connected()
    state = _find(registry, run)
    with explained():
        if state.ended or not call_lives(state.call):
            print(f"run {state.run}: nothing of it is running. {_headline(state, False)}")
            return 0
        gone = not now and state.place == "gpu" and _saves_and_ends(registry, state)
        state = registry.read(state.run) or state
    if not gone:
        stop(state.call, state)
    saved = f"Saved is {state.saved}." if state.saved else "No checkpoint was saved yet."
    print(f"Stopped {state.run}. {saved} Go on with: {command('resume', state.run)}")
    return 0


def _saves_and_ends(registry: Registry, state: State) -> bool:
    """Whether the run did so, when it was asked to, in the time it has for that."""
    registry.ask_to_stop(state.run)
    print(f"Asked {state.run} to save and end; --now does not wait for that.", flush=True)
    until = time.monotonic() + STOP_WAIT
    while time.monotonic() < until:
        if not call_lives(state.call):
            return True
        time.sleep(1.0)
    return False


def show_setup(check_run: bool) -> int:
    """What is there, what is not, and the command for it."""
    has_oauth = all(modal_settings.get(name) for name in OAUTH)
    check_credentials()
    print(f"credentials   {'OAuth' if has_oauth else 'token'} for {modal_settings.get('server_url')}")
    check_reachable()
    print("service       answers")
    settings = ModalConfig()
    with explained():
        for name in (settings.volume, settings.hf_cache_volume):
            within(30.0, lambda name=name: modal.Volume.from_name(name, create_if_missing=True).hydrate())  # type: ignore[misc]
            print(f"volume        {name}")
    for name, key, way_out in (
        (settings.wandb_secret, "WANDB_API_KEY", "or export it here, or --no-wandb"),
        ("huggingface", "HF_TOKEN", "for private models alone; then --set modal.hf_secret=huggingface"),
    ):
        try:
            modal.Secret.from_name(name, required_keys=[key]).hydrate()
            print(f"secret        {name} with {key}")
        except modal.exception.NotFoundError:
            print(f"secret        none: modal secret create {name} {key}=... ({way_out})")
    if check_run:
        print(f"container     {_in_a_container()}")
    print(f"Next: {command('run', '--backend', 'modal', '--gpu-type', 'CPU', '--gpus', '2', '--dp-size', '2')}")
    return 0


def _in_a_container() -> str:
    app = modal.App("ray-pipeline-setup")
    function = app.function(image=modal.Image.debian_slim(), serialized=True, include_source=False)(lambda: "runs")
    with explained(), app.run():
        return str(function.remote())
