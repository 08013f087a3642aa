"""What every rank of a training stage sets up first: its device, its place in the mesh, where it reports to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from model.config import ModelConfig
from model.kernels.cuda.fp8_kernel import kernel_for
from model.parallel.mesh import Mesh
from model.parallel.placement import layers_by_hand
from ray_pipeline.engine.engine import Engine
from ray_pipeline.engine.options import EngineOptions
from ray_pipeline.errors import UserError
from ray_pipeline.hardware import fp8_refusal, num_cpus
from ray_pipeline.launch.rank_errors import RankStatus
from ray_pipeline.launch.stage_context import StageContext
from ray_pipeline.layout.layout import Layout, layout_of
from ray_pipeline.records.progress import Progress
from ray_pipeline.settings.post_training import LoraConfig
from ray_pipeline.settings.schema import PipelineFields, TrainingConfig


@dataclass
class Rank:
    """One rank of one stage.

    Attributes:
        folder: the stage's folder. data: DATA_PREP's folder. upstream: folders of finished stages by name.
        profile: which steps are profiled, in a run of the stage for that alone; see `StepProfile`.
    """

    config: PipelineFields
    stage: str
    folder: Path
    data: Path
    upstream: dict[str, Path]
    mesh: Mesh
    device: torch.device
    status: RankStatus
    progress: Progress | None
    profile: dict[str, Any] | None = None

    @property
    def settings(self) -> TrainingConfig:
        """This stage's section of the config."""
        return getattr(self.config, self.stage)

    @property
    def is_main(self) -> bool:
        """Rank 0, which writes files and reports."""
        return self.mesh.rank == 0

    def phase(self, name: str, done: int = 0, total: int = 0) -> None:
        """Report what goes on besides training steps: on the progress line, and for the error if this rank is lost."""
        self.status.at(name)
        if self.progress is not None:
            self.progress.phase(name, done, total)

    def engine(self, model: ModelConfig, initial: Mapping[str, torch.Tensor] | None = None) -> Engine:
        """An engine that only reads `model`, in this run's layout."""
        return Engine(model, self.mesh, self._options(model), initial=initial)

    def trainer_engine(
        self, model: ModelConfig, initial: Mapping[str, torch.Tensor] | None, *, lora: LoraConfig | None = None
    ) -> Engine:
        """An engine with this stage's optimizer."""
        layout, optimizer = self.config.layout, self.settings.optimizer
        options = replace(
            self._options(model), optimizer=optimizer, zero_stage=layout.zero_stage,
            offload_optimizer=layout.offload_optimizer, lora=lora,
            indexer_warmup_steps=self.config.dense_steps(self.stage),
        )  # fmt: skip
        return Engine(model, self.mesh, options, initial=initial)

    def _options(self, model: ModelConfig) -> EngineOptions:
        """What both kinds of engine have of the settings."""
        layout = self.config.layout
        return EngineOptions(
            precision=self.settings.precision, fp8_dispatch=self.settings.fp8_dispatch,
            micro_batch=layout.micro_batch, row_length=self.config.data.seq_len,
            device=self.device, seed=self.config.seed, schedule=layout.schedule,
            pp_layout=layers_by_hand(layout.pp_layout, self.config.model, model),
            activation_checkpointing=layout.activation_checkpointing, on_phase=self.status.at,
        )  # fmt: skip


def rank_arguments(context: StageContext, stage: str) -> dict[str, Any]:
    """What `start_rank` needs, picklable."""
    return {
        "config": context.config.model_dump(mode="json"),
        "stage": stage,
        "folder": str(context.folder),
        "upstream": {name: str(result.folder) for name, result in context.inputs.items()},
        "log_level": context.config.tracking.log_level,
    }


def start_rank(arguments: dict[str, Any]) -> Rank:
    """This process's Rank; torch.distributed is already initialised by the launcher when there are several ranks."""
    config = PipelineFields.model_validate(arguments["config"])
    world = dist.get_world_size() if dist.is_initialized() else 1
    use_cuda = torch.cuda.is_available() and config.backend != "cpu"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        if getattr(config, arguments["stage"]).precision == "fp8" and not config.layout.emulate_fp8:
            _check_fp8(arguments["stage"], device)
    elif world > 1:
        torch.set_num_threads(max(1, num_cpus() // world))
    wanted = layout_of(config.layout, "cuda" if use_cuda else "cpu")
    layout = wanted.on_ranks(world)
    folder, stage = Path(arguments["folder"]), arguments["stage"]
    rank = dist.get_rank() if dist.is_initialized() else 0
    status = RankStatus(folder, rank, layout.coordinate(rank), stage)
    mesh = Mesh(layout, timeout=timedelta(seconds=config.layout.timeout_seconds), node=ranks_of_a_node())
    upstream = {name: Path(path) for name, path in arguments["upstream"].items()}
    progress = None
    if mesh.rank == 0:
        progress = Progress(folder, stage, getattr(config, stage).steps, note=lost_ranks(wanted, layout))
    return Rank(
        config, stage, folder, upstream["data_prep"], upstream, mesh, device, status, progress, arguments.get("profile")
    )  # fmt: skip


def ranks_of_a_node() -> int | None:
    """How many ranks every node has, by the launcher's word; None where nodes differ, or numbers of ranks mix them."""
    if not dist.is_initialized():
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    placed = [(0, 0)] * dist.get_world_size()
    dist.all_gather_object(placed, (here, int(os.environ.get("LOCAL_RANK", "0"))))
    alike = here > 0 and all(place == (here, rank % here) for rank, place in enumerate(placed))
    return here if alike else None


def _check_fp8(stage: str, device: torch.device) -> None:
    """Raise UserError where products in fp8 would be emulated: by what the GPU does, whatever it is called."""
    if not kernel_for(device):
        raise UserError(fp8_refusal(stage, torch.cuda.get_device_name(device)))


def lost_ranks(wanted: Layout, here: Layout) -> str | None:
    """`2 of 4 ranks left: dp=1`, where an elastic run goes on with fewer than it was asked for."""
    return f"{here.gpus} of {wanted.gpus} ranks left: dp={here.dp}" if here.gpus < wanted.gpus else None
