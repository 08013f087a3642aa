"""What several settings of SFT, DPO, GRPO and DISTILLATION together can get wrong. Part of `checks`.

A setting without effect under the others that were chosen is a mistake too: whoever wrote it believes that it counts.
Settings of stages that the run does not have are not looked at: a recipe may be run without some of its stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ray_pipeline.settings.chain import TOP_K, is_top_k
from ray_pipeline.settings.lora_targets import target_problem
from ray_pipeline.settings.schema import GrpoConfig, PipelineFields
from ray_pipeline.settings.section import Section


def post_training_problems(config: PipelineFields) -> Iterator[str]:
    """Everything that cannot work, as `key=value: reason. Way out.`"""
    checks = {"sft": _sft, "dpo": _dpo, "grpo": _grpo, "distillation": _distillation}
    for stage, check in checks.items():
        if stage in config.stages:
            yield from check(config)
    if any(stage in config.stages for stage in checks):  # all of them are evaluated with the tools
        yield from _tools(config)
        problem = sharded_sampling_problem(config) if config.layout.sampling == "sharded" else None
        if problem is not None:
            yield f"layout.sampling=sharded: {problem}"


def sharded_sampling_problem(config: PipelineFields) -> str | None:
    """Why training ranks cannot write these answers with their shards, and what to change; None where they can."""
    layout, grpo = config.layout, config.grpo if "grpo" in config.stages else None
    if config.tools.names and layout.pp_size * layout.tp_size > 1:
        return (
            f"tools.names={config.tools.names} with pp_size={layout.pp_size} and tp_size={layout.tp_size}: every rank "
            "of a replica would call them, and they may say something else each time. Leave out the tools, or use "
            "layout.sampling=whole."
        )
    if grpo is not None and grpo.rollout.workers:
        return (
            f"grpo.rollout.workers={grpo.rollout.workers}: each of these actors holds a whole model. Use "
            "grpo.rollout.workers=0, or layout.sampling=whole."
        )
    if grpo is not None and grpo.speculative and layout.pp_size * layout.ep_size > 1:
        return (
            f"grpo.speculative=true with pp_size={layout.pp_size} and ep_size={layout.ep_size}: the MTP modules draft "
            "on one rank of a replica alone. Leave it out, or use layout.sampling=whole."
        )
    return None


def _changed(section: Section, *keys: str) -> dict[str, Any]:
    """Those of the keys that are not at their defaults, with their values."""
    fields = type(section).model_fields
    values = {key: getattr(section, key) for key in keys}
    return {k: v for k, v in values.items() if v != fields[k].get_default(call_default_factory=True)}


def _without_effect(section: Section, name: str, keys: tuple[str, ...], reason: str) -> Iterator[str]:
    for key, value in _changed(section, *keys).items():
        yield f"{name}.{key}={value}: has no effect, because {reason}. Leave it out, or change that."


def _sft(config: PipelineFields) -> Iterator[str]:
    lora = config.sft.lora
    if lora.r == 0:
        keys = ("alpha", "dropout", "target_modules")
        yield from _without_effect(lora, "sft.lora", keys, "sft.lora.r=0 trains every weight without adapters")
    elif (problem := target_problem(config.model, lora.target_modules)) is not None:
        yield f"sft.lora.target_modules={lora.target_modules}: {problem}"
    elif lora.dropout == 1:
        yield "sft.lora.dropout=1.0: nothing would be left to train on. Use a smaller share, for example 0.05."
    elif lora.dropout and config.layout.activation_checkpointing != "none":
        yield (
            f"sft.lora.dropout={lora.dropout}: with layout.activation_checkpointing="
            f"{config.layout.activation_checkpointing} activations are computed again when other rows' masks are at "
            "hand. Use --activation-checkpointing none, or --set sft.lora.dropout=0."
        )


def _dpo(config: PipelineFields) -> Iterator[str]:
    dpo = config.dpo
    if dpo.loss_type == "ipo":
        reason = "dpo.loss_type=ipo regresses on the margin and takes no label for certain"
        yield from _without_effect(dpo, "dpo", ("label_smoothing",), reason)


def _grpo(config: PipelineFields) -> Iterator[str]:
    grpo = config.grpo
    if grpo.clip_low >= 1:
        yield f"grpo.clip_low={grpo.clip_low}: the ratio is clipped below at 1 - clip_low; use a value below 1"
    if not grpo.rewards or not any(grpo.rewards.values()):
        yield f"grpo.rewards={grpo.rewards}: nothing would be rewarded. Name a reward, for example {{answer: 1.0}}."
    if grpo.beta == 0:
        keys = ("refresh_reference_every", "unbiased_kl")
        yield from _without_effect(grpo, "grpo", keys, "grpo.beta=0 drops the reference")
    if grpo.overlong_buffer == 0:
        yield from _without_effect(grpo, "grpo", ("overlong_penalty",), "grpo.overlong_buffer=0 leaves it no room")
    elif grpo.overlong_buffer >= grpo.max_new_tokens:
        yield (
            f"grpo.overlong_buffer={grpo.overlong_buffer}: the penalty would begin before the first of "
            f"max_new_tokens={grpo.max_new_tokens} tokens. Use a smaller one, for example {grpo.max_new_tokens // 4}."
        )
    yield from _mini_batches(grpo)
    yield from _drafting(config)
    yield from _rollout(config)
    yield from _correction(grpo)


def _mini_batches(grpo: GrpoConfig) -> Iterator[str]:
    if grpo.checkpoint_every % grpo.steps_per_rollout:
        yield (
            f"grpo.checkpoint_every={grpo.checkpoint_every}: must be a multiple of updates_per_rollout="
            f"{grpo.updates_per_rollout} x num_iterations={grpo.num_iterations}, because rollouts are not part of a "
            f"checkpoint. Use for example {grpo.steps_per_rollout}."
        )
    answers = grpo.prompts_per_step * grpo.group_size
    if grpo.updates_per_rollout > answers:
        yield (
            f"grpo.updates_per_rollout={grpo.updates_per_rollout}: cuts prompts_per_step x group_size = {answers} "
            f"answers into mini-batches. Use at most {answers}, and grpo.num_iterations to train on them again."
        )


def _drafting(config: PipelineFields) -> Iterator[str]:
    if config.grpo.speculative and not config.model.num_nextn_predict_layers:
        yield (
            "grpo.speculative=True: model.num_nextn_predict_layers=0 leaves no MTP module to draft with. "
            "Set it to 1, or grpo.speculative=false."
        )


def _rollout(config: PipelineFields) -> Iterator[str]:
    rollout = config.grpo.rollout
    if rollout.max_staleness and not rollout.workers:
        yield (
            "grpo.rollout.max_staleness=1: the training ranks sample themselves and cannot train meanwhile. Use "
            "--set grpo.rollout.workers=1 or more, or max_staleness=0."
        )
    if rollout.engine == "vllm":
        yield (
            "grpo.rollout.engine=vllm: not offered. Loading a step's weights into a vLLM model that is already "
            "initialised can corrupt its experts, and nothing would show it. Use engine=native."
        )


def _correction(grpo: GrpoConfig) -> Iterator[str]:
    low, high, mode = grpo.correction_min, grpo.correction_max, grpo.sampler_correction
    if not grpo.recompute_logprobs:
        reason = "grpo.recompute_logprobs=false takes the sampler's log-probabilities for the trainer's"
        yield from _without_effect(grpo, "grpo", ("sampler_correction", "correction_min", "correction_max"), reason)
        if grpo.rollout.max_staleness:
            yield (
                "grpo.recompute_logprobs=false, grpo.rollout.max_staleness=1: answers of older weights would train "
                "without a correction. Leave out either."
            )
    elif mode == "none":
        reason = "grpo.sampler_correction=none weighs nothing"
        yield from _without_effect(grpo, "grpo", ("correction_min", "correction_max"), reason)
        if grpo.rollout.max_staleness:
            yield (
                "grpo.sampler_correction=none, grpo.rollout.max_staleness=1: answers of older weights would train "
                "without a correction. Use sequence_mask, the default, or one of the others."
            )
    elif low is None and high is None and mode.endswith("truncate"):
        yield f"grpo.sampler_correction={mode}: has no bound to truncate at. Set grpo.correction_max, for example 3.0."
    if low is not None and high is not None and low >= high:
        yield f"grpo.correction_min={low:g}: must be below correction_max={high:g}. Use for example 0.5 and 5."


def _tools(config: PipelineFields) -> Iterator[str]:
    tools, tokenizer = config.tools, config.tokenizer
    if not tools.names:
        keys = ("listed", "max_calls", "timeout_seconds")
        yield from _without_effect(tools, "tools", keys, "tools.names=[] offers no tool")
    elif tokenizer.name == "train" and not tokenizer.tools:
        yield (
            f"tools.names={tools.names}: the trained tokenizer has no tokens for calls. "
            "Add --set tokenizer.tools=true, or name a tokenizer that has them."
        )


def _distillation(config: PipelineFields) -> Iterator[str]:
    settings, name = config.distillation, "distillation"
    if settings.loss != "jsd":
        yield from _without_effect(settings, name, ("jsd_beta",), f"distillation.loss={settings.loss} is not jsd")
    if settings.loss != "hidden":
        reason = f"distillation.loss={settings.loss} compares no hidden states"
        yield from _without_effect(settings, name, ("hidden_weight",), reason)
    if settings.on_policy == 0:
        reason = "distillation.on_policy=0 lets the student answer nothing"
        yield from _without_effect(settings, name, ("prompts_per_step",), reason)
    if not settings.conversations and not settings.teacher_answers and settings.on_policy < 1:
        yield (
            "distillation.conversations=False, teacher_answers=0: there is nothing to learn on. Set one of them, or "
            "distillation.on_policy=1."
        )
    if settings.loss == "cross_entropy":
        yield from _tokens_alone(config)
    if settings.loss == "hidden" and settings.teacher is None:
        student, teacher = settings.student.hidden_size, config.model.hidden_size
        if student not in (None, teacher):
            yield (
                f"distillation.loss=hidden: distillation.student.hidden_size={student} and the teacher's {teacher} "
                "cannot be compared. Leave the student's width out, or use another loss."
            )
    if is_top_k(settings.teacher):
        yield from _top_k(config)


def _tokens_alone(config: PipelineFields) -> Iterator[str]:
    settings = config.distillation
    reason = "distillation.loss=cross_entropy learns tokens, not distributions"
    yield from _without_effect(settings, "distillation", ("temperature",), reason)
    if settings.on_policy:
        yield (
            f"distillation.on_policy={settings.on_policy}: with loss=cross_entropy the student would learn its own "
            "answers as they are. Use loss=forward_kl, reverse_kl or jsd, in which the teacher scores them."
        )
    if settings.teacher is not None and not settings.teacher_answers and settings.init == "random":
        yield (
            f"distillation.teacher={settings.teacher}: nothing is learned from it with loss=cross_entropy, "
            "teacher_answers=0 and init=random. Leave it out, or let it answer: teacher_answers=2000."
        )


def _top_k(config: PipelineFields) -> Iterator[str]:
    """A folder of log-probabilities holds no model: it cannot write, be copied, or score what it has not seen."""
    settings = config.distillation
    given = f"distillation.teacher={settings.teacher}"
    cannot = {
        f"distillation.on_policy={settings.on_policy}": (settings.on_policy > 0, "on_policy=0"),
        f"distillation.teacher_answers={settings.teacher_answers}": (settings.teacher_answers > 0, "teacher_answers=0"),
        f"distillation.init={settings.init}": (settings.init != "random", "init=random"),
        f"distillation.loss={settings.loss}": (settings.loss in ("hidden", "cross_entropy"), "loss=forward_kl"),
        f"distillation.conversations={settings.conversations}": (not settings.conversations, "conversations=true"),
        "distillation.teacher_layout": (settings.teacher_layout is not None, "teacher_layout=null"),
    }
    for key, (chosen, way_out) in cannot.items():
        if chosen:
            yield (
                f"{key} with {given}: stored log-probabilities are no model, and stand for the conversations' rows "
                f"alone. Use --set distillation.{way_out}, or give the teacher itself instead of {TOP_K}."
            )
