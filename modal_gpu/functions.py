"""The Modal app of a run: a conductor and functions with and without GPUs, as its settings ask for them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import modal

from modal_gpu.body import LONGEST, conduct, work
from modal_gpu.gpus import Shape
from modal_gpu.image import build_image
from ray_pipeline.settings.schema import PipelineFields

APP_NAME = "ray-pipeline"
RUNS = "/runs"
HF_CACHE = "/root/.cache/huggingface"
CONDUCTOR_CPUS, CONDUCTOR_MIB = 0.25, 1024
STAGE_CPUS, STAGE_MIB = 8.0, 32768  # of a container that prepares data or exports


@dataclass(frozen=True)
class RunApp:
    """An app with the functions of one run, by what they are for."""

    app: modal.App
    image: modal.Image
    functions: dict[str, Any]


def secrets_of(config: PipelineFields, env: dict[str, str]) -> list[modal.Secret]:
    """Keys that trackers and the Hub need: those set here go along, else Modal's secrets of the settings' names."""
    wanted = ["WANDB_API_KEY"] if config.tracking.wandb else []
    here = {name: env[name] for name in (*wanted, "HF_TOKEN") if env.get(name)}
    named = [modal.Secret.from_name(config.modal.wandb_secret, required_keys=wanted)] if wanted else []
    if "WANDB_API_KEY" in here:
        named = []
    if config.modal.hf_secret is not None and "HF_TOKEN" not in here:
        named.append(modal.Secret.from_name(config.modal.hf_secret, required_keys=["HF_TOKEN"]))
    travelling: dict[str, str | None] = dict(here)
    return [*named, *([modal.Secret.from_dict(travelling)] if here else [])]


def volumes_of(config: PipelineFields) -> dict[str | PurePosixPath, Any]:
    """Where runs and what comes from the Hub are kept."""
    return {
        RUNS: modal.Volume.from_name(config.modal.volume, create_if_missing=True),
        HF_CACHE: modal.Volume.from_name(config.modal.hf_cache_volume, create_if_missing=True),
    }


def build_app(config: PipelineFields, shape: Shape) -> RunApp:
    """The app for these settings, and the containers in which they train."""
    app = modal.App(APP_NAME)
    image, settings = build_image(config), config.modal
    region = [name.strip() for name in settings.region.split(",")] if settings.region else None
    limit = int(min(settings.timeout_seconds, LONGEST))
    # A container that is taken away begins its input again. One that crashed does so only where the conductor says.
    again = modal.Retries(max_retries=5, initial_delay=1.0, backoff_coefficient=2.0)
    common: dict[str, Any] = {"image": image, "timeout": limit, "region": region, "include_source": False}
    stages = common | {"volumes": volumes_of(config), "secrets": secrets_of(config, dict(os.environ))}
    body = work if shape.hosts == 1 else modal.clustered(size=shape.hosts, rdma=not shape.on_cpu)(work)
    gpu = app.function(
        name="train", gpu=shape.gpu(), cpu=shape.cpus, memory=shape.memory_mib,
        # Each input in a container of its own: nothing of an attempt before is left in memory or on the GPUs.
        single_use_containers=True, **stages,
    )(body)  # fmt: skip
    plain = stages | {"nonpreemptible": settings.nonpreemptible}
    return RunApp(
        app,
        image,
        {
            "gpu": gpu,
            "cpu": app.function(name="prepare", cpu=STAGE_CPUS, memory=STAGE_MIB, **plain)(work),
            "conductor": app.function(
                name="conductor", cpu=CONDUCTOR_CPUS, memory=CONDUCTOR_MIB, retries=again, **common
            )(conduct),
        },
    )
