"""Which stages a run has, and which of them a stage reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ray_pipeline.errors import UserError, did_you_mean
from ray_pipeline.settings.run_folder import MODEL
from ray_pipeline.settings.schema import STAGES, TRAINING_STAGES, PipelineFields

# Each goes on with the weights of the one before it; DISTILLATION takes the last one's as its teacher.
POLICY_STAGES = ("pretrain", "sft", "dpo", "grpo")
TOP_K = "topk:"  # before the folder of stored log-probabilities that `distillation.teacher` may name


def chain(config: PipelineFields) -> tuple[str, ...]:
    """The run's stages in the order they run in, however `stages` lists them."""
    return tuple(stage for stage in STAGES if stage in config.stages)


def trained(config: PipelineFields) -> tuple[str, ...]:
    """The run's training stages in order."""
    return tuple(stage for stage in chain(config) if stage in TRAINING_STAGES)


def edited(stages: Sequence[str], skip: Sequence[str], *, dpo: bool) -> list[str]:
    """`stages` without those of `--skip`, and with DPO for `--dpo`.

    Raises:
        UserError: a stage that is not there to be left out.
    """
    wanted = [*stages, *(["dpo"] if dpo and "dpo" not in stages else [])]
    for name in skip:
        if name not in STAGES:
            raise UserError(
                f"--skip {name}: no such stage{did_you_mean(name, STAGES)}. The stages are {', '.join(STAGES)}."
            )
        if name not in stages:
            raise UserError(f"--skip {name}: this run has the stages {', '.join(stages)} anyway. Omit the flag.")
    return [stage for stage in wanted if stage not in skip]


def reads_text(config: PipelineFields) -> bool:
    """Whether DATA_PREP prepares pretraining text: for PRETRAIN's rows, or to train a tokenizer on."""
    return "pretrain" in config.stages or config.tokenizer.name == "train"


def reads_teacher(config: PipelineFields) -> bool:
    """Whether DISTILLATION needs its teacher; a random student that learns on conversations alone does not."""
    settings = config.distillation
    learns = settings.loss != "cross_entropy" or settings.on_policy > 0 or settings.teacher_answers > 0
    return learns or settings.init == "teacher_layers"


def reads_folder(config: PipelineFields, stage: str) -> bool:
    """Whether a training stage starts from the model folder of `init_from`."""
    own = stage == "distillation" and (config.distillation.teacher is not None or not reads_teacher(config))
    return config.init_from.path is not None and input_stage(config, stage) is None and not own


def input_stage(config: PipelineFields, stage: str) -> str | None:
    """The stage whose model this one starts from or learns from; None for given or random weights."""
    if stage == "distillation" and (config.distillation.teacher is not None or not reads_teacher(config)):
        return None
    before = STAGES[: STAGES.index(stage)]
    policies = [name for name in POLICY_STAGES if name in before and name in config.stages]
    return policies[-1] if policies else None


def lineage(config: PipelineFields, stage: str) -> tuple[str, ...]:
    """The training stages whose weights, or teaching, ended in those of `stage`, first to last."""
    before = input_stage(config, stage)
    return (*(lineage(config, before) if before is not None else ()), stage)


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


def is_top_k(teacher: str | None) -> bool:
    """Whether the name is `topk:PATH`."""
    return teacher is not None and teacher.startswith(TOP_K)


def teacher_path(teacher: str) -> Path:
    """The folder that is read: the model of a stage's folder, else the folder itself."""
    path = Path(teacher.removeprefix(TOP_K))
    return path / MODEL if (path / MODEL / "config.json").is_file() else path
