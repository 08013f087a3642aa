"""Whether a training stage fits: the one judgement that `plan`, the start of a run and advised layouts go by.

And how its ranks write answers, for which `layout.sampling: auto` takes what fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ray_pipeline.costs.hardware_table import PROCESS, Hardware, for_ranks
from ray_pipeline.costs.held import Memory
from ray_pipeline.costs.memory import stage_memory
from ray_pipeline.costs.workload import FP32, Workload, workload
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.post_training_checks import sharded_sampling_problem
from ray_pipeline.settings.schema import TRAINING_STAGES, PipelineFields

ANSWERING = ("sft", "dpo", "grpo", "distillation")  # stages
CUDA_PROCESS = 4 << 30  # bytes of CPU memory of a rank that imported torch and Ray and opened CUDA


@dataclass(frozen=True)
class Fit:
    """Memory that a stage needs, and that there is.

    Attributes:
        memory: the fullest moment of each pipeline rank. usable: bytes that tensors can take on a rank.
        needs: what its device has to hold of each pipeline rank; on CPUs what lies in CPU memory belongs to it.
        host, host_usable: bytes of the first node's CPU memory beside GPUs; 0 on CPUs.
    """

    memory: list[Memory]
    usable: int
    needs: list[int]
    host: int
    host_usable: int

    @property
    def fullest(self) -> int:
        """The pipeline rank that needs most memory."""
        return max(range(len(self.needs)), key=lambda rank: self.needs[rank])

    @property
    def fits(self) -> bool:
        return self.fits_device and self.host <= self.host_usable

    @property
    def fits_device(self) -> bool:
        return max(self.needs) <= self.usable


def judge(work: Workload, hardware: Hardware) -> Fit:
    """Hold the stage against what each of its ranks has (`hardware_table.for_ranks`)."""
    memory = stage_memory(work, hardware.device)
    needs = [device_bytes(work, held, hardware.device) for held in memory]
    host = host_usable = 0
    if hardware.device != "cpu":
        ranks = min(work.layout.gpus, hardware.node)  # a node holds as many of the fullest as it has devices
        each = max(sum(held.host.values()) for held in memory)
        host, host_usable = ranks * (CUDA_PROCESS + each) + sum(work.copies.once.values()), ranks * hardware.host
    return Fit(memory, hardware.memory - hardware.reserved, needs, host, host_usable)


def device_bytes(work: Workload, memory: Memory, device: str) -> int:
    """Bytes of a rank that its device has to hold; ranks on CPUs share one memory, and what lies there once."""
    if device != "cpu":
        return memory.total
    return memory.total + sum(memory.host.values()) + sum(work.copies.once.values()) // work.layout.gpus


def rank_bytes(config: PipelineFields, layout: Layout, stage: str, node: int | None = None) -> int:
    """Bytes that the fullest rank of any stage needs where it computes, and its process: the figure in a run's plan."""
    if stage not in TRAINING_STAGES:
        return PROCESS + FP32 * config.model.num_params()
    work = workload(config, layout, stage, node)
    return PROCESS + max(device_bytes(work, held, layout.device) for held in stage_memory(work, layout.device))


def with_sampling(config: PipelineFields, layout: Layout, stage: str, hardware: Hardware | None) -> PipelineFields:
    """The settings with `auto` decided for training stage `stage`: `sharded` where whole copies do not fit and shards
    can do what is asked; else `whole`.

    Args:
        hardware: None where it is not known, so that nothing says what fits.
    """
    if config.layout.sampling != "auto":
        return config
    whole = _set(config, "whole")
    if stage not in ANSWERING or hardware is None or sharded_sampling_problem(config) is not None:
        return whole
    there = replace(layout, device="cpu" if hardware.device == "cpu" else "cuda")
    fits = judge(workload(whole, there, stage, hardware.node), for_ranks(hardware, layout.gpus)).fits
    return whole if fits else _set(config, "sharded")


def _set(config: PipelineFields, sampling: str) -> PipelineFields:
    return config.model_copy(update={"layout": config.layout.model_copy(update={"sampling": sampling})})
