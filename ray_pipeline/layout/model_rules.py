"""Rules of layouts that come with a mechanism of the model, the optimizer or adapters, for the table in `rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import gcd

from model.config import ModelConfig
from model.parallel.placement import num_stages, parts_of, stage_layers
from ray_pipeline.layout.layout import Layout, Refusal
from ray_pipeline.settings.chain import trained
from ray_pipeline.settings.lora_targets import adapter_params
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


def _tables_have_one_rate(config: PipelineFields, layout: Layout) -> Refusal | None:
    for stage in trained(config):
        for key in ("embedding_lr_factor", "head_lr_factor"):
            factor = getattr(getattr(config, stage).optimizer, key)
            if factor != 1 and layout.pp > 1 and layout.zero_stage > 0:
                return Refusal(
                    f"zero_stage={layout.zero_stage} with pp_size={layout.pp} and {stage}.optimizer.{key}={factor:g}",
                    "ZeRO sums the gradient norm over pipeline ranks one group of parameters after another, and only "
                    "one of the ranks has this group",
                    f"Use --zero-stage 0, --pp-size 1, or --set {stage}.optimizer.{key}=1",
                )
    return None


def _has_adapters(config: PipelineFields) -> bool:
    return "sft" in trained(config) and config.sft.lora.r > 0


def _adapters_are_whole(config: PipelineFields, layout: Layout) -> Refusal | None:
    if not _has_adapters(config) or layout.tp == 1:
        return None
    return Refusal(
        f"tp_size={layout.tp} with sft.lora.r={config.sft.lora.r}",
        "tensor parallelism cuts the matrices that adapters are put on, and adapters are not cut",
        "Use --tp-size 1 (--sp-size, --pp-size and --dp-size work), or --set sft.lora.r=0",
    )


def _frozen_experts_are_nobodys_copies(config: PipelineFields, layout: Layout) -> Refusal | None:
    if not _has_adapters(config) or layout.ep == 1 or layout.zero_stage == 0:
        return None
    return Refusal(
        f"zero_stage={layout.zero_stage} with ep_size={layout.ep} and sft.lora.r={config.sft.lora.r}",
        "DeepSpeed takes frozen experts, which differ from rank to rank, for copies of each other",
        "Use --zero-stage 0 (the optimizer holds adapters alone), or --ep-size 1",
    )


def _every_rank_has_an_adapter(config: PipelineFields, layout: Layout) -> Refusal | None:
    lora, model = config.sft.lora, config.model
    if not _has_adapters(config):
        return None
    parts = stage_layers(model, num_stages(layout.schedule, layout.pp), layout.pp_layout)
    for rank in range(layout.pp):
        held = [parts[stage] for stage in parts_of(layout.schedule, layout.pp, rank)]
        if not any(adapter_params(model, layers, lora.r, lora.target_modules) for layers in held):
            return Refusal(
                f"pp_size={layout.pp} with sft.lora.target_modules={lora.target_modules}",
                f"pipeline rank {rank} has no layer of these names, and so nothing to train",
                "Use --pp-size 1, or leave sft.lora.target_modules empty for those of attention",
            )
    return None


MODEL_RULES: dict[str, Check] = {
    "key and value heads are shared evenly by tp": _key_heads_are_shared,
    "a stack that is applied several times is on one pipeline rank": _recursion_has_one_stage,
    "embedding and head with rates of their own are on every ZeRO rank": _tables_have_one_rate,
    "Muon needs whole matrices": _muon_has_whole_matrices,
    "adapters are not cut by tp": _adapters_are_whole,
    "ZeRO does not know frozen experts": _frozen_experts_are_nobodys_copies,
    "every pipeline rank has an adapter": _every_rank_has_an_adapter,
}
