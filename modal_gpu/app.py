"""The Modal app: one function that runs the pipeline. GPUs, volumes and secret are set per run from the config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any

import modal

from modal_gpu.body import RemoteResult, execute_here
from modal_gpu.image import build_image
from ray_pipeline.settings.schema import ModalConfig

APP_NAME = "ray-pipeline"
RUNS = "/runs"
HF_CACHE = "/root/.cache/huggingface"
_CPUS, _MEMORY_MIB = 8, 65536

app = modal.App(APP_NAME)


@app.function(
    image=build_image(),
    cpu=_CPUS,
    memory=_MEMORY_MIB,
    timeout=86400,
    # A container that is taken away starts again with the same arguments; the ledger makes that a resume.
    retries=modal.Retries(max_retries=3, initial_delay=1.0, backoff_coefficient=2.0),
)
def pipeline(
    config_yaml: str,
    stages: dict[str, str | None],
    volume: str,
    runs_dir: str = RUNS,
    dry_run: bool = False,
    resume: bool = False,
) -> RemoteResult:
    """Run the pipeline in the container; `volume` holds the runs."""
    return execute_here(config_yaml, stages, runs_dir, dry_run=dry_run, resume=resume, save=_committer(volume))


def _committer(volume: str) -> Callable[[], None]:
    """What makes written files last: a commit of the volume, and nothing when the body runs on the user's machine."""
    if modal.is_local():
        return lambda: None
    return modal.Volume.from_name(volume).commit


def configured(settings: ModalConfig, gpus: int, *, wandb: bool) -> modal.Function[Any, Any, Any]:
    """The function with this run's GPUs, volumes, time limit and secret."""
    volumes: dict[str | PurePosixPath, modal.Volume | modal.CloudBucketMount] = {
        RUNS: modal.Volume.from_name(settings.volume, create_if_missing=True),
        HF_CACHE: modal.Volume.from_name(settings.hf_cache_volume, create_if_missing=True),
    }
    secrets = [modal.Secret.from_name(settings.wandb_secret, required_keys=["WANDB_API_KEY"])] if wandb else []
    return pipeline.with_options(
        gpu=f"{settings.gpu_type}:{gpus}", timeout=settings.timeout_seconds, volumes=volumes, secrets=secrets
    )
