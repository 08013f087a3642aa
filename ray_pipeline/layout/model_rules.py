"""Rules of layouts that come with a mechanism of the model or the optimizer, for the table in `layout_rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd

from model.config import ModelConfig
from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.layout.lora_rules import LORA_RULES
from ray_pipeline.settings.chain import trained
from ray_pipeline.settings.schema import PipelineFields

Check = Callable[[PipelineFields, Layout], Refusal | None]


def models(config: PipelineFields) -> Iterator[tuple[str, ModelConfig]]:
    """Key and architecture of every model a run lays out: the run's own, and the distillation student."""
    yield "model", config.model
    if "distillation" in config.stages:
        yield "distillation.student", config.distillation.student.applied_to(config.model)


def _key_heads_are_shared(config: PipelineFields, layout: Layout) -> Refusal | None:
    """Of every kind but MQA: its one key head is whole on each rank. Sequence parallelism sends a head to several."""
    cut = [(key, model) for key, model in models(config) if model.attention != "mqa"]
    for key, model in cut:
        if model.num_kv_heads % layout.tp:
            shared = gcd(*(other.num_kv_heads for _, other in cut), *(m.num_attention_heads for _, m in models(config)))
            largest = max(size for size in range(1, layout.tp) if shared % size == 0)
            return Refusal(
                f"tp_size={layout.tp}",
                f"each rank keeps the keys and values of its share of the heads, and "
                f"{key}.num_key_value_heads={model.num_kv_heads} cannot be shared evenly by {layout.tp} ranks",
                f"Use --tp-size {largest}, the largest that works; --sp-size shares heads that are too few for tp",
            )
    return None


def _recursion_has_one_stage(config: PipelineFields, layout: Layout) -> Refusal | None:
    for _, model in models(config):
        if layout.pp > 1 and model.recursion_depth > 1:
            return Refusal(
                f"pp_size={layout.pp} with model.recursion_depth={model.recursion_depth}",
                "the stack of layers is applied several times, and a pipeline takes a token through its stages once",
                "Use --pp-size 1, or --set model.recursion_depth=1",
            )
    return None


def _muon_has_whole_matrices(config: PipelineFields, layout: Layout) -> Refusal | None:
    stage = next((name for name in trained(config) if getattr(config, name).optimizer.name == "muon"), None)
    if stage is None or (layout.zero_stage == 0 and layout.tp == 1):
        return None
    zero = layout.zero_stage > 0
    cause = "ZeRO shards the optimizer's matrices" if zero else "tensor parallelism cuts matrices"
    return Refusal(
        f"{'zero_stage' if zero else 'tp_size'}={layout.zero_stage if zero else layout.tp} with "
        f"{stage}.optimizer.name=muon",
        f"{cause}, and a part of a matrix cannot be orthogonalised without the rest",
        f"Use {'--zero-stage 0' if zero else '--tp-size 1'}, or --set {stage}.optimizer.name=adamw",
    )


MODEL_RULES: dict[str, Check] = {
    "key and value heads are shared evenly by tp": _key_heads_are_shared,
    "a stack that is applied several times is on one pipeline rank": _recursion_has_one_stage,
    "Muon needs whole matrices": _muon_has_whole_matrices,
    **LORA_RULES,
}
