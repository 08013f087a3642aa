"""`--backend modal`: checks, sends the run off, streams its log, fetches the outputs."""

from __future__ import annotations

from dataclasses import asdict
from typing import IO, TYPE_CHECKING

import modal
from modal.config import config as modal_settings

from modal_gpu.app import RUNS, app, configured
from modal_gpu.files import fetch, local_inputs, remote_name
from ray_pipeline.costs.prices import with_price
from ray_pipeline.dag.budget import estimate_lines
from ray_pipeline.dag.identity import moved_name, with_source_names
from ray_pipeline.dag.plan import plan as plan_stages
from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.layout.layout import Layout, with_layout
from ray_pipeline.settings.loading import config_yaml

if TYPE_CHECKING:
    from ray_pipeline.dag.request import RunRequest
    from ray_pipeline.settings.schema import PipelineFields

GPU_TYPES = ("T4", "L4", "A10", "L40S", "A100", "A100-40GB", "A100-80GB", "RTX-PRO-6000", "H100", "H200", "B200")
GPUS_PER_CONTAINER = 8


class _Files:
    """A Modal volume as `fetch` sees it."""

    def __init__(self, volume: modal.Volume):
        self.volume = volume

    def files(self, folder: str) -> list[tuple[str, int, int]]:
        entries = self.volume.listdir(folder, recursive=True)
        return [(entry.path, entry.size, entry.mtime) for entry in entries if entry.type.name == "FILE"]

    def read(self, path: str, into: IO[bytes]) -> None:
        self.volume.read_file_into_fileobj(path, into)


def check(config: PipelineFields, layout: Layout) -> None:
    """Refuse what Modal cannot place.

    Raises:
        UserError: unknown GPU type, or more GPUs than one container has.
    """
    gpu_type = config.modal.gpu_type
    # "H100!" is Modal's way to refuse an upgrade to a better type.
    if gpu_type.upper().rstrip("!") not in GPU_TYPES:
        hint = did_you_mean(gpu_type.upper(), GPU_TYPES)
        raise UserError(f"--gpu-type {gpu_type}: Modal has no such GPU{hint}. The types are {', '.join(GPU_TYPES)}.")
    if layout.gpus > GPUS_PER_CONTAINER:
        raise UserError(
            f"gpus={layout.gpus}: one Modal container has at most {GPUS_PER_CONTAINER} GPUs. "
            f"Use --gpus {GPUS_PER_CONTAINER} or fewer."
        )


def check_credentials() -> None:
    """Refuse to start without an account.

    Raises:
        UserError: how to get a token.
    """
    if not (modal_settings.get("token_id") and modal_settings.get("token_secret")):
        raise UserError(
            "--backend modal: no Modal credentials here. Make a free account at https://modal.com, then run "
            "`modal token new` (or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET). Without an account use --backend auto."
        )


def execute_on_modal(request: RunRequest) -> int:
    """Run the pipeline on Modal and bring its outputs into the local run folder. Returns the run's exit code."""
    layout = request.layout
    check(request.config, layout)
    if request.dry_run:
        return plan(request)
    check_credentials()
    config = with_price(with_layout(request.config, layout))
    assert config.run_name is not None
    function = configured(config.modal, layout.gpus, wandb=config.tracking.wandb)
    print(f"Modal: {config.modal.gpu_type} x {layout.gpus}, run {config.run_name}, volume {config.modal.volume}")
    for line in estimate_lines(config, layout, plan_stages(config, layout, request.run_dir, request.stages)):
        print(line)
    try:
        with modal.enable_output():
            volume = modal.Volume.from_name(config.modal.volume, create_if_missing=True)
            remote = upload(config, volume)
            with app.run():
                result = function.remote(
                    config_yaml(remote), asdict(request.stages), config.modal.volume, resume=request.resume
                )
            files, size = fetch(_Files(volume), config.run_name, config.output_dir)
    except modal.exception.AuthError as error:
        raise UserError(f"Modal refused the credentials ({error}). Run `modal token new` again.") from None
    except modal.exception.NotFoundError as error:
        raise UserError(
            f"Modal: {error}. If it is the secret: modal secret create {config.modal.wandb_secret} WANDB_API_KEY=..., "
            "or run with --no-wandb."
        ) from None
    except modal.exception.ConnectionError as error:
        raise UserError(f"Modal cannot be reached ({error}). Look at the network, or use --backend auto.") from None
    if result.error is not None:
        raise UserError(result.error)
    print(f"Fetched {files} files ({size / 2**20:.1f} MiB) into {config.output_dir / config.run_name}")
    return result.exit_code


def upload(config: PipelineFields, volume: modal.Volume) -> PipelineFields:
    """Send local input files to the volume; returns the settings for the container."""
    inputs = local_inputs(config)
    places = {path: remote_name(path) for path in inputs.values()}
    if places:
        with volume.batch_upload(force=True) as batch:
            for path, place in places.items():
                put = batch.put_directory if path.is_dir() else batch.put_file
                put(path, place)
        for path, place in places.items():
            if remote_name(path) != place:  # its place is named by what it held before
                raise UserError(f"{path}: changed while it was uploaded. Run the same command again.")
    # The name may go on after the path: data.parquet:column
    names = {name: moved_name(name, path, f"{RUNS}/{places[path]}") for name, path in inputs.items()}
    config = with_source_names(config, names)
    return config.model_copy(update={"backend": "cuda"})


def plan(request: RunRequest) -> int:
    """Print what would run, and where, without an account."""
    from ray_pipeline.dag.workflow import execute

    settings = request.config.modal
    print(f"Modal: would rent {settings.gpu_type} x {request.layout.gpus} for at most {settings.timeout_seconds} s")
    return execute(request)
