"""How the training ranks of a stage write answers: what `layout.sampling` says, and for `auto` what fits."""

from __future__ import annotations

from dataclasses import replace

from ray_pipeline.costs.fit import judge
from ray_pipeline.costs.hardware_table import Hardware, for_ranks
from ray_pipeline.costs.workload import workload
from ray_pipeline.layout.layout import Layout
from ray_pipeline.settings.post_training_checks import sharded_sampling_problem
from ray_pipeline.settings.schema import PipelineFields

ANSWERING = ("sft", "dpo", "grpo", "distillation")


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
    fits = judge(workload(whole, there, stage), for_ranks(hardware, layout.gpus)).fits
    return whole if fits else _set(config, "sharded")


def _set(config: PipelineFields, sampling: str) -> PipelineFields:
    return config.model_copy(update={"layout": config.layout.model_copy(update={"sampling": sampling})})
