"""What only several settings together can get wrong. Returns every problem as a sentence; raises nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from model.convert.gguf_rules import check_gguf, gguf_gap
from model.convert.hf_config import published_family, unpublished_reason
from ray_pipeline.settings.chain import POLICY_STAGES, chain, exported_stage, reads_teacher
from ray_pipeline.settings.post_training_checks import post_training_problems
from ray_pipeline.settings.schema import STAGES, TRAINING_STAGES, PipelineFields

_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def problems(config: PipelineFields) -> list[str]:
    """Everything that cannot work, as `key=value: reason. Way out.`"""
    return [
        *_not_finite(config.model_dump(), ""),
        *_chain(config),
        *_architecture(config),
        *_lengths(config),
        *_data(config),
        *_init_from(config),
        *_indexer(config),
        *_guards(config),
        *_budget(config),
        *post_training_problems(config),
    ]


def warnings(config: PipelineFields) -> list[str]:
    """What works but is probably not meant."""
    out = []
    if config.data.preferences != "builtin" and "dpo" not in config.stages:
        out.append(f"data.preferences={config.data.preferences}: read by DPO alone, which this run has not: add --dpo.")
    teacher = config.model.num_params(mtp=False)
    student = config.distillation.student.applied_to(config.model).num_params(mtp=False)
    if "distillation" in config.stages and config.distillation.teacher is None and 2 * student > teacher:
        out.append(
            f"the distillation student has {student / teacher:.0%} of its teacher's parameters, more than half: "
            "lower distillation.student.num_hidden_layers or its widths."
        )
    out += _warm_ups(config)
    return out + (list(_export_notes(config)) if "export" in config.stages else [])


def _warm_ups(config: PipelineFields) -> Iterator[str]:
    """Those that are longer than the run, in which they are shortened."""
    for stage in (stage for stage in TRAINING_STAGES if stage in chain(config)):
        settings = getattr(config, stage)
        given, taken = settings.optimizer.warmup_steps, settings.optimizer.warm_up(settings.steps)
        if taken != given:
            yield (
                f"{stage}.optimizer.warmup_steps={given}: longer than its {settings.steps} steps, so the rate of "
                f"{settings.optimizer.lr:g} would never be reached. Warmed up for {taken} instead."
            )


def _export_notes(config: PipelineFields) -> Iterator[str]:
    """What EXPORT does otherwise than for a DeepSeek-V3 model."""
    family = published_family(config.model)
    if family is None:
        yield (
            f"{unpublished_reason(config.model)}: exported in this project's format, which `--init-from` reads, "
            "not as a Hugging Face folder."
        )
    elif config.model.num_nextn_predict_layers and not family.mtp:
        yield f"a {family.title} checkpoint has no multi-token prediction modules: exported without them."
    if config.export.gguf and (gap := gguf_gap(config.model)):
        yield f"{gap}: no GGUF file is written."


def _not_finite(value: Any, key: str) -> Iterator[str]:
    """YAML and float() know .inf and .nan; no setting does."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _not_finite(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_finite(inner, f"{key}.{index}")
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}={value}: must be a finite number"


def _chain(config: PipelineFields) -> Iterator[str]:
    """Stages without what they read."""
    stages, listed = chain(config), config.stages
    if len(set(listed)) < len(listed):
        yield f"stages={listed}: a stage is named twice; each runs once, in the order {', '.join(STAGES)}"
    if "data_prep" not in stages:
        yield f"stages={listed}: every other stage reads data_prep's data. Add data_prep; what is done is reused."
    policies = [stage for stage in stages if stage in POLICY_STAGES]
    needs_weights = policies[:1] or [stage for stage in stages if stage == "distillation"]
    teacher = (config.distillation.teacher is not None or not reads_teacher(config)) and not policies
    if needs_weights and needs_weights[0] != "pretrain" and config.init_from.path is None and not teacher:
        yield (
            f"stages={listed}: {needs_weights[0]} starts from weights that no stage makes. Add pretrain, or give a "
            "model folder with --init-from."
        )
    source = config.export.source
    if "export" in stages and (exported_stage(config) is None or (source is not None and source not in stages)):
        yield f"stages={listed}, export.source={source}: no stage makes these weights. Add it, or leave out export."


def _architecture(config: PipelineFields) -> Iterator[str]:
    try:
        config.model.validate()
    except ValueError as error:
        yield f"model.{error}"
        return
    exported = config.model if exported_stage(config) != "distillation" else None
    if "distillation" in config.stages and config.distillation.teacher is None:  # else the teacher's folder decides
        student = config.distillation.student.applied_to(config.model)
        try:
            student.validate()
        except ValueError as error:
            yield f"distillation.student: {error}"
            return
        exported = exported or student
    if "export" in config.stages and config.export.gguf and exported is not None:
        try:
            if gguf_gap(exported) is None:  # else none is written
                check_gguf(exported)
        except ValueError as error:
            yield f"export.gguf={config.export.gguf}: {error}"
    if exported is not None and config.export.dtype == "fp8" and (reason := unpublished_reason(exported)):
        yield f"export.dtype=fp8: {reason}, and this project's own format is float32 or bfloat16. Set one of these."
    if config.tokenizer.name == "train" and config.model.vocab_size < config.tokenizer.vocab_size:
        yield (
            f"model.vocab_size={config.model.vocab_size}: smaller than tokenizer.vocab_size="
            f"{config.tokenizer.vocab_size}, so some tokens would have no embedding. Set both to the same number."
        )
    if config.tokenizer.name == "train" and config.tokenizer.vocab_size < 300:
        yield (
            f"tokenizer.vocab_size={config.tokenizer.vocab_size}: a byte-level BPE has 256 bytes and the special "
            "tokens before its first merge. Use at least 300."
        )


def _lengths(config: PipelineFields) -> Iterator[str]:
    context = config.model.max_position_embeddings
    if config.data.seq_len > context:
        yield (
            f"data.seq_len={config.data.seq_len}: longer than model.max_position_embeddings={context}. "
            f"Use --seq-len {context} or less, or --set model.max_position_embeddings={config.data.seq_len}."
        )
    for key, tokens in (
        ("grpo.max_new_tokens", config.grpo.max_new_tokens),
        ("evaluation.max_new_tokens", config.evaluation.max_new_tokens),
    ):
        if tokens >= context:
            yield (
                f"{key}={tokens}: leaves no room for the question in model.max_position_embeddings={context}. "
                f"Use at most {context // 2}, or a longer context."
            )


def _data(config: PipelineFields) -> Iterator[str]:
    data = config.data
    if not data.pretrain:
        yield 'data.pretrain=[]: at least one source of text is needed, for example [{name: "builtin"}]'
    unweighted = [source.name for source in data.pretrain if source.weight is None]
    if 0 < len(unweighted) < len(data.pretrain):
        yield (
            f'data.pretrain: "{unweighted[0]}" has no weight and others have. Give every source one, for shares of the '
            "text, or none, to use each whole."
        )
    names = {"data.sft": data.sft, "data.prompts": data.prompts, "data.preferences": data.preferences}
    names["tokenizer.name"] = config.tokenizer.name
    names |= {f"data.pretrain.{index}.name": source.name for index, source in enumerate(data.pretrain)}
    for key, name in names.items():
        if not name.strip():
            yield f'{key}="": must name a source, for example "{"train" if key == "tokenizer.name" else "builtin"}"'
    if not 0 < data.validation_fraction < 1:
        yield (
            f"data.validation_fraction={data.validation_fraction}: some documents must be held out to measure the "
            "loss, and some kept to train on. Use for example 0.02."
        )
    if config.evaluation.questions > data.heldout_questions:
        yield (
            f"evaluation.questions={config.evaluation.questions}: only data.heldout_questions="
            f"{data.heldout_questions} are held out. Ask fewer, or hold out more."
        )
    if config.run_name is not None and not _FOLDER_NAME.fullmatch(config.run_name):
        yield (
            f'run_name="{config.run_name}": names a folder; use letters, digits, ".", "_" and "-", starting with a '
            "letter or digit, at most 100 characters."
        )


def _indexer(config: PipelineFields) -> Iterator[str]:
    steps, total = config.pretrain.indexer_warmup_steps, config.pretrain.steps
    if steps is None:
        return
    if config.model.attention != "dsa":
        yield (
            f"pretrain.indexer_warmup_steps={steps}: model.attention={config.model.attention} has no indexer. Omit it, "
            "or set model.attention=dsa."
        )
    elif steps > total:
        yield f"pretrain.indexer_warmup_steps={steps}: more than pretrain.steps={total}. Use at most {total}."


def _guards(config: PipelineFields) -> Iterator[str]:
    zero = config.layout.zero_stage
    for name, policy in config.guards.model_dump().items():
        if policy == "skip" and zero:
            yield (
                f"guards.{name}=skip: with layout.zero_stage={zero} weights are moved as soon as gradients are known. "
                f"Use guards.{name}=rewind, or --zero-stage 0."
            )


def _budget(config: PipelineFields) -> Iterator[str]:
    if config.cost.budget_usd is not None and config.cost.usd_per_gpu_hour is None and config.backend != "modal":
        yield (
            f"cost.budget_usd={config.cost.budget_usd:g}: what a GPU costs here is not known. Give "
            "--set cost.usd_per_gpu_hour=... as well."
        )


def _init_from(config: PipelineFields) -> Iterator[str]:
    settings = config.init_from
    for key in ("include", "exclude", "allow_missing"):
        patterns = getattr(settings, key)
        if patterns and settings.path is None:
            yield f"init_from.{key}={patterns}: chooses tensors of a model folder; give one with --init-from."
        if any(not pattern.strip() for pattern in patterns):
            yield f"init_from.{key}={patterns}: an empty pattern would match every tensor; omit it."
