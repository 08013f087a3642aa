"""Which stages a run has, and which of them a stage reads."""

from __future__ import annotations

from ray_pipeline.config import STAGES, PipelineFields

# Each goes on with the weights of the one before it; DISTILLATION takes the last one's as its teacher.
POLICY_STAGES = ("pretrain", "sft", "dpo", "grpo")


def chain(config: PipelineFields) -> tuple[str, ...]:
    """The run's stages in the order they run in, however `stages` lists them."""
    return tuple(stage for stage in STAGES if stage in config.stages)


def input_stage(config: PipelineFields, stage: str) -> str | None:
    """The stage whose model this one starts from or learns from; None for given or random weights."""
    if stage == "distillation" and config.distillation.teacher is not None:
        return None
    before = STAGES[: STAGES.index(stage)]
    policies = [name for name in POLICY_STAGES if name in before and name in config.stages]
    return policies[-1] if policies else None


def upstream(config: PipelineFields, stage: str) -> tuple[str, ...]:
    """The stages whose outputs this one reads."""
    if stage == "data_prep":
        return ()
    read = ["data_prep"]
    source = exported_stage(config) if stage == "export" else input_stage(config, stage)
    if source is not None:
        read.append(source)
    if stage == "export" and source != "distillation" and "distillation" in config.stages:
        read.append("distillation")
    return tuple(read)


def exported_stage(config: PipelineFields) -> str | None:
    """The stage whose weights EXPORT writes as the model; None where no stage makes any."""
    last = input_stage(config, "export") or ("distillation" if "distillation" in config.stages else None)
    return config.export.source or last
