"""`eval --backend modal`: the model of a run there answers on CPUs beside its files; the report alone comes here."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modal

from modal_gpu.body import LONGEST
from modal_gpu.failures import explained
from modal_gpu.functions import APP_NAME, RUNS, STAGE_CPUS, STAGE_MIB, secrets_of, volumes_of
from modal_gpu.image import build_image
from modal_gpu.verbs import files_of
from ray_pipeline.errors import UserError
from ray_pipeline.settings.loading import load_config
from ray_pipeline.settings.run_folder import CONFIG_FILE
from ray_pipeline.settings.schema import PipelineFields

Evaluate = Callable[[str, dict[str, Any]], dict[str, Any]]


def evaluate_there(run: str, options: dict[str, Any], evaluate: Evaluate) -> str:
    """Ask the model of a run on Modal, in a container without GPUs that ends with the answer, or with Ctrl-C.

    Args:
        options: of `eval`. evaluate: (run, options) -> the report; called in the container.
    Returns:
        The report, as `eval --json` writes it.
    Raises:
        UserError: what Modal, or `evaluate` there, refuses.
    """
    there = files_of(run)
    with explained():
        config = _settings(there.read(CONFIG_FILE, 0), there.run)
        app = modal.App(APP_NAME)
        function = app.function(
            name="evaluate", image=build_image(config), volumes=volumes_of(config), include_source=False,
            secrets=[] if options["no_tracking"] else secrets_of(config, dict(os.environ)),
            cpu=STAGE_CPUS, memory=STAGE_MIB, timeout=int(min(config.modal.timeout_seconds, LONGEST)),
        )(answer)  # fmt: skip
        found: dict[str, str] | None = None
        with modal.enable_output(), app.run():
            found = function.remote(there.run, {**options, "runs_dir": RUNS}, config.modal.volume, evaluate)
    if found is None:  # after Ctrl-C, which Modal's client swallows; the app has ended with it
        raise KeyboardInterrupt
    if "refused" in found:
        raise UserError(f"on Modal: {found['refused']}")
    return found["report"]


def _settings(stored: bytes, run: str) -> PipelineFields:
    if not stored:
        raise UserError(f"run {run}: nothing of it is on its volume yet. Look with `modal status {run}`.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, CONFIG_FILE)
        path.write_bytes(stored)
        return load_config(path)


def answer(run: str, options: dict[str, Any], volume: str, evaluate: Evaluate) -> dict[str, str]:
    """In the container: `{"report": JSON}`, or `{"refused": message}`. What the run's folder gets is kept."""
    kept = modal.Volume.from_name(volume)
    kept.reload()
    try:
        report = evaluate(run, options)
    except UserError as error:
        return {"refused": str(error)}
    kept.commit()
    return {"report": json.dumps(report)}
